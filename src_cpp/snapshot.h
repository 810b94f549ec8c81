// What a session remembers, as bytes. Cache rows that stay where they are go by rows of a cache tensor; what the next token
// overwrites (recurrent and convolution state, the drafter's ring) is one blob, the state, whose size depends on the
// number of committed tokens alone. A state begins with that number and a hash of their ids, so that it is never taken
// for another timeline's.
//
// Knows which tensors hold what; the timeline itself is the session's. Nothing here is checked twice: callers see to it
// that rows exist and that a state has its size.
#pragma once

#include "step_graphs.h"

namespace pf {

// K and V of each attention layer, in turn.
int32_t n_kv_tensors(const Caches & caches);
ggml_tensor * kv_tensor(const Caches & caches, int32_t i);

// ids [n]: the committed tokens.
uint64_t state_bytes(const Caches & caches, int64_t n);
void get_state(const Caches & caches, const int32_t * ids, int64_t n, void * out);
void set_state(const Caches & caches, int64_t n, const void * state);
// Whether a state is the one that these tokens leave behind.
bool is_state_of(const void * state, const int32_t * ids, int64_t n);

// All of it, KV rows and state, from where it lies to where it goes; the caches have equal shapes but for their rows.
void copy_timeline(const Caches & from, const Caches & to, int64_t n);

} // namespace pf
