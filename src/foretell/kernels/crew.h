// How many threads are worth calling, by how long the first one had to wait for the others.
#pragma once
#include <stdint.h>

namespace ft {

// On a machine that others use, too, a thread may lose its processor for many milliseconds, and all
// others wait for it at their next meeting. Where the first thread has waited for longer than it has
// worked, half of the team is as quick: it is halved, for a spell that grows each time that more
// were tried and it came to the same.
struct Crew {
  static constexpr int64_t SPELL = 200000000, LONGEST = 10000000000;  // ns
  static constexpr int64_t WINDOW = 200000000;  // of work and waiting that counts
  static constexpr int64_t LEAST = 1000000;     // waiting before anything is thought of it
  static constexpr int64_t CALM = 4 * SPELL;    // work without a halving that ends all suspicion
  int halvings = 0;
  int64_t until = 0;  // end of the spell
  int64_t spell = SPELL;
  int64_t worked = 0, waited = 0;  // lately, with this many
  int64_t calm = 0;                // worked since the last halving

  int size(int threads, int64_t now) {
    if (halvings && now >= until) {
      --halvings;
      until = now + spell;
      worked = waited = calm = 0;
    }
    const int left = halvings < 8 ? threads >> halvings : 0;
    return left > 1 ? left : 1;
  }

  void observe(int64_t took, int64_t of_it_waited, int64_t now) {
    worked += took - of_it_waited, waited += of_it_waited, calm += took - of_it_waited;
    if (waited > worked && waited > LEAST) {
      ++halvings;
      until = now + spell;
      spell = 2 * spell < LONGEST ? 2 * spell : LONGEST;
      worked = waited = calm = 0;
    } else if (calm > CALM) {
      spell = SPELL;
    }
    if (worked + waited > WINDOW) worked /= 2, waited /= 2;
  }
};

}  // namespace ft
