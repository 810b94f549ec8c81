// The walk from the root along the target's own choices: exact at any temperature, since every token is the target's.
#pragma once

#include <cstdint>

#include "tree.h"

namespace pf {

struct Accepted {
    int32_t n_path = 0;           // accepted nodes, the root included: 1 ..
    int32_t path[PF_MAX_NODES];   // their indices, from the root down
    int32_t tokens[PF_MAX_NODES]; // [n_path], what the target said at each; the last is the new pending one
    bool stopped = false;         // the last token is a stop token
};

// choose(node) -> token is called once per visited node, in path order; is_stop(token) -> bool. Gives max_tokens tokens
// at most, but always the root's. Of siblings with one token (a drafter's choices have none) the first is followed.
template <class Choose, class IsStop>
void accept(const Tree & tree, int32_t max_tokens, Choose && choose, IsStop && is_stop, Accepted & out) {
    out.n_path = 0;
    out.stopped = false;
    for (int32_t node = 0; node >= 0;) {
        const int32_t token = choose(node);
        out.path[out.n_path] = node;
        out.tokens[out.n_path++] = token;
        out.stopped = is_stop(token);
        if (out.stopped || out.n_path >= max_tokens) {
            return;
        }
        int32_t next = -1;
        for (int32_t i = node + 1; i < tree.n_nodes; ++i) {
            if (tree.parent[i] == node && tree.token[i] == token) {
                next = i;
                break;
            }
        }
        node = next;
    }
}

} // namespace pf
