// The playground: streams answers through the public API and draws what the server measures.
// No framework and no build step. Text from the model only ever becomes text nodes.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const state = { running: null, methods: null, polling: 0 };

// ---- the server ------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer.", 0);
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // not JSON: a proxy's page
  }
  throw new Refusal(message, response.status);
}

async function* events(path, body, signal) {
  const response = await call(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Refusal("The server broke off.", 0);
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(chunk.error.message, chunk.error.code);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---- one answer ------------------------------------------------------------------------------

class Painter {
  // Appends tokens once per frame, so that fast streams cost one layout each frame.
  constructor(box) {
    this.box = box;
    this.queue = [];
    this.frame = 0;
    box.replaceChildren();
    box.setAttribute("aria-busy", "true");
  }

  add(text, drafted) {
    this.queue.push([text, drafted]);
    if (!this.frame) this.frame = requestAnimationFrame(() => this.paint());
  }

  paint() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const below = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight;
    const part = document.createDocumentFragment();
    for (const [text, drafted] of this.queue) {
      const span = document.createElement("span");
      span.className = drafted ? "drafted" : "own";
      span.textContent = text;
      part.append(span);
    }
    this.queue = [];
    this.box.append(part);
    if (below < 40) this.box.scrollTop = this.box.scrollHeight;
  }

  end() {
    this.paint();
    this.box.setAttribute("aria-busy", "false");
  }
}

class Meter {
  // What the stream tells, by the clock of whoever waits for it; at its end the server's own count.
  constructor() {
    this.start = performance.now();
    this.first = this.last = 0;
    this.tokens = this.own = this.early = 0; // early: tokens that came with the first ones
    this.ids = [];
    this.text = "";
    this.speculation = this.timing = this.reason = null;
  }

  take(id, text, drafted) {
    const now = performance.now();
    if (!this.first) this.first = now;
    if (now - this.first < 1) this.early++;
    this.last = now;
    this.tokens++;
    this.own += drafted ? 0 : 1;
    this.ids.push(id);
    this.text += text;
  }

  get speed() {
    if (this.timing && this.timing.tokens_per_s) return this.timing.tokens_per_s;
    const later = this.tokens - this.early;
    return later > 0 ? (1000 * later) / (this.last - this.first) : 0;
  }

  get length() {
    const exact = this.speculation && this.speculation.acceptance_length;
    return exact || (this.own ? this.tokens / this.own : 0);
  }
}

function request(prompt, extra) {
  const chat = document.querySelector('input[name="mode"]:checked').value === "chat";
  const seed = $("seed").value.trim();
  const body = {
    model: state.model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature", 0),
    max_tokens: number("tokens", 160),
    foretell: true,
    ...(seed === "" ? {} : { seed: Number(seed) }),
    ...extra,
  };
  if (chat) return ["v1/chat/completions", { ...body, messages: [{ role: "user", content: prompt }] }];
  return ["v1/completions", { ...body, prompt }];
}

function number(id, otherwise) {
  const value = $(id).value.trim();
  return value === "" || Number.isNaN(Number(value)) ? otherwise : Number(value);
}

async function answer(box, prompt, extra, signal, watch = () => {}) {
  const painter = new Painter(box);
  const meter = new Meter();
  const [path, body] = request(prompt, extra);
  try {
    for await (const chunk of events(path, body, signal)) {
      meter.speculation = chunk.speculation || meter.speculation;
      meter.timing = chunk.timing || meter.timing;
      const choice = chunk.choices && chunk.choices[0];
      if (!choice) continue;
      const text = (choice.delta ? choice.delta.content : choice.text) || "";
      meter.reason = choice.finish_reason || meter.reason;
      if (choice.foretell) meter.take(choice.foretell.token, text, choice.foretell.drafted);
      if (text) painter.add(text, Boolean(choice.foretell && choice.foretell.drafted));
      watch(meter);
    }
  } finally {
    painter.end();
  }
  return meter;
}

// ---- what the reader sees --------------------------------------------------------------------

const REASONS = { stop: "ended by itself", length: "stopped at max tokens" };
const round = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
const speed = (value) => round(value, value < 100 ? 1 : 0);

function facts(meter) {
  $("f-tokens").textContent = String(meter.tokens);
  $("f-speed").textContent = meter.speed ? speed(meter.speed) : "–";
  $("f-length").textContent = meter.length ? round(meter.length, 2) : "–";
  const share = meter.tokens ? (100 * (meter.tokens - meter.own)) / meter.tokens : NaN;
  $("f-share").textContent = Number.isFinite(share) ? `${round(share, 0)} %` : "–";
  $("f-first").textContent = meter.first ? `${round(meter.first - meter.start, 0)} ms` : "–";
}

function blank() {
  for (const id of ["f-tokens", "f-speed", "f-length", "f-share", "f-first"]) $(id).textContent = "–";
  for (const id of ["off-speed", "on-speed", "verdict", "why"]) $(id).textContent = "";
  $("problem").hidden = true;
}

function show(pair) {
  $("pair").hidden = !pair;
  $("single").hidden = pair;
  $("facts").hidden = pair;
  const box = $("status");
  if (box.getBoundingClientRect().top < innerHeight * 0.8) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  box.scrollIntoView({ behavior: calm ? "auto" : "smooth" }); // a phone: the answer is further down
}

function problem(error) {
  $("problem").textContent = error.message;
  $("problem").hidden = false;
  if (error.status === 401) $("access").open = true;
}

function choice() {
  const name = $("drafter").value;
  if (name === "") return {};
  return { speculation: name === "off" ? { off: true } : { drafter: name } };
}

async function during(work) {
  if (state.running) return;
  const prompt = $("prompt").value;
  if (prompt === "") {
    $("status").textContent = "";
    problem(new Refusal("The prompt is empty: write something to go on from.", 400));
    $("prompt").focus();
    return;
  }
  state.running = new AbortController();
  $("run").disabled = $("ab").disabled = true;
  $("stop").disabled = false;
  blank();
  try {
    $("status").textContent = await work(prompt, state.running.signal);
  } catch (error) {
    $("status").textContent = error.name === "AbortError" ? "Stopped." : "";
    if (error.name !== "AbortError") problem(error);
  } finally {
    const stopped = document.activeElement === $("stop");
    state.running = null;
    $("run").disabled = $("ab").disabled = false;
    $("stop").disabled = true;
    if (stopped) $("run").focus();
  }
}

function generate() {
  return during(async (prompt, signal) => {
    show(false);
    $("status").textContent = "Generating.";
    const meter = await answer($("answer"), prompt, choice(), signal, facts);
    facts(meter);
    const why = meter.speculation && meter.speculation.why_off;
    $("why").textContent = why ? `Not drafted: ${why}` : "";
    const end = REASONS[meter.reason] || meter.reason || "done";
    return `${meter.tokens} tokens, ${speed(meter.speed)} per second, ${end}.`;
  });
}

function compare() {
  return during(async (prompt, signal) => {
    show(true);
    $("off").replaceChildren();
    $("on").replaceChildren();
    const given = $("seed").value.trim();
    const seed = given === "" ? Math.floor(Math.random() * 2 ** 31) : Number(given);
    const runs = {};
    const picked = choice();
    const on = picked.speculation && picked.speculation.off ? {} : picked;
    for (const [id, extra] of [["off", { speculation: { off: true } }], ["on", on]]) {
      $("status").textContent = `Drafting ${id}.`;
      const say = (meter) => {
        $(`${id}-speed`).textContent = meter.speed ? `${speed(meter.speed)} tokens per second` : "";
      };
      runs[id] = await answer($(id), prompt, { ...extra, seed }, signal, say);
      say(runs[id]);
    }
    $("verdict").textContent = verdict(runs.off, runs.on);
    return `Same prompt, same seed (${seed}).`;
  });
}

function verdict(off, on) {
  const ratio = off.speed && on.speed ? ` Drafting on ran at ${round(on.speed / off.speed, 2)} times the speed of off.` : "";
  const same = off.text === on.text && off.ids.length === on.ids.length && off.ids.every((id, i) => id === on.ids[i]);
  if (same) return `Identical: all ${off.tokens} tokens are the same.${ratio}`;
  let at = off.ids.findIndex((id, i) => id !== on.ids[i]);
  if (at < 0) at = off.ids.length;
  const promise = on.speculation && on.speculation.promise;
  const because = promise && promise !== "exact" ? ` (the promise of this drafter is ${promise}, not exact)` : "";
  return `Different from token ${at + 1} on${because}.${ratio}`;
}

// ---- charts ----------------------------------------------------------------------------------

class Chart {
  // Lines over the last minute: x is time in seconds before now, y goes from `floor` to the most.
  constructor(name, floor, least, digits, describe) {
    this.svg = $(`chart-${name}`);
    this.value = $(`c-${name}`);
    this.floor = floor;
    this.least = least; // the axis reaches at least this far
    this.digits = digits;
    this.describe = describe;
    this.points = [];
    this.area = this.part("path", "area");
    this.lines = [this.part("path", "line"), this.part("path", "line second")];
  }

  part(kind, name) {
    const node = document.createElementNS(SVG, kind);
    node.setAttribute("class", name);
    this.svg.append(node);
    return node;
  }

  add(at, values) {
    this.points.push([at, values]);
    while (this.points.length && this.points[0][0] < at - 62) this.points.shift();
    const shown = this.points.flatMap(([, list]) => list.filter((v) => v !== null));
    const most = Math.max(this.least, ...shown);
    const place = (t, v) => `${round(300 - (at - t) * 5, 1)} ${round(62 - (60 * (v - this.floor)) / (most - this.floor), 1)}`;
    this.lines.forEach((line, i) => {
      line.setAttribute("d", this.path((t, list) => (list[i] === undefined ? null : list[i]), place));
    });
    this.area.setAttribute("d", this.filled(place));
    const peak = round(Math.max(this.floor, ...shown), this.digits);
    const name = this.svg.parentNode.firstChild.firstChild.textContent.trim();
    this.value.textContent = `${this.describe(values)}, most ${peak}`;
    this.svg.setAttribute("aria-label", `${name}: ${this.describe(values)}, at most ${peak} in the last minute`);
  }

  path(read, place) {
    let pen = "M";
    let out = "";
    for (const [t, list] of this.points) {
      const v = read(t, list);
      if (v === null) {
        pen = "M";
        continue;
      }
      out += pen === "M" ? `M${place(t, v)}l0 0` : `L${place(t, v)}`; // l0 0: a lone point is a dot
      pen = "L";
    }
    return out;
  }

  filled(place) {
    let out = "";
    let run = [];
    const close = () => {
      if (run.length > 1) {
        const [from, to] = [run[0], run[run.length - 1]];
        out += `M${place(from[0], this.floor)}${run.map(([t, v]) => `L${place(t, v)}`).join("")}L${place(to[0], this.floor)}Z`;
      }
      run = [];
    };
    for (const [t, [v]] of this.points) v === null ? close() : run.push([t, v]);
    close();
    return out;
  }
}

const one = (values, digits) => (values[0] === null ? "–" : round(values[0], digits));
const charts = {
  speed: new Chart("speed", 0, 10, 0, (v) => one(v, 0)),
  length: new Chart("length", 1, 2, 2, (v) => one(v, 2)),
  batch: new Chart("batch", 0, 4, 0, (v) => (v[1] ? `${v[0]} and ${v[1]} waiting` : String(v[0]))),
};

async function poll() {
  clearTimeout(state.polling);
  if (!document.hidden) {
    try {
      const now = await (await call("v1/foretell/stats")).json();
      const before = state.stats;
      state.stats = now;
      if (before && now.time < before.time) Object.values(charts).forEach((c) => c.points.splice(0)); // another process
      if (before && now.time > before.time) {
        const tokens = Math.max(0, now.generated_tokens - before.generated_tokens);
        const own = tokens - (now.accepted_tokens - before.accepted_tokens); // one a forward
        charts.speed.add(now.time, [tokens / (now.time - before.time)]);
        charts.length.add(now.time, [own > 0 && own <= tokens ? tokens / own : null]);
        charts.batch.add(now.time, [now.running, now.waiting || null]);
      }
    } catch (error) {
      if (error.status === 401) return; // goes on when a key is given
    }
  }
  state.polling = setTimeout(poll, state.running ? 500 : 1500);
}

// ---- start -----------------------------------------------------------------------------------

async function connect() {
  try {
    const offer = await (await call("v1/foretell/methods")).json();
    state.model = offer.model;
    state.methods = offer.drafters;
    $("model").textContent = offer.model;
    $("version").textContent = offer.version;
    const names = [["", `${offer.default} (default)`], ...offer.drafters.filter((d) => d.name !== offer.default).map((d) => [d.name, d.name]), ["off", "off"]];
    $("drafter").replaceChildren(...names.map(([value, text]) => new Option(text, value)));
    $("drafter").dataset.fallback = offer.default;
    const chat = document.querySelector('input[value="chat"]');
    chat.disabled = !offer.chat;
    chat.parentNode.title = offer.chat ? "" : "This model has no chat template.";
    note();
    $("problem").hidden = true;
    poll();
  } catch (error) {
    $("model").textContent = error.status === 401 ? "an API key is needed" : "not connected";
    problem(error);
  }
}

function note() {
  const name = $("drafter").value || $("drafter").dataset.fallback;
  const method = (state.methods || []).find((d) => d.name === name);
  $("drafter-note").textContent = name === "off" ? "Plain decoding: one token a step." : method ? method.summary : "";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop").addEventListener("click", () => state.running && state.running.abort());
$("ab").addEventListener("click", compare);
$("drafter").addEventListener("change", note);
$("key").addEventListener("change", () => {
  sessionStorage.setItem("foretell-key", $("key").value.trim());
  connect();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
  if (event.key === "Escape" && state.running) state.running.abort();
});
document.addEventListener("visibilitychange", () => !document.hidden && poll());

$("key").value = sessionStorage.getItem("foretell-key") || "";
if (/Mac|iPhone|iPad/.test(navigator.platform)) $("keys").firstChild.textContent = "⌘";
connect();
