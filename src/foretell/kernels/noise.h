// Sampling with keyed noise.
#pragma once
#include <stdint.h>

// argmax(softmax(logits / temperature) / E) for the noise E of `key`, or -1 where it is too close to
// call or the logits are not fit for it (NaN, infinity). logits [vocab]; temperature: a positive
// number.
extern "C" __attribute__((visibility("default"))) int64_t ft_race(const float* logits, int64_t vocab,
                                                                  double temperature, uint64_t key);
