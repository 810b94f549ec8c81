// The C interface to the parts of a step: checks what the caller passed, then calls spec/.
#include <algorithm>
#include <cmath>

#include "api_guard.h"
#include "spec/chooser.h"
#include "spec/copy_index.h"
#include "spec/tree.h"

namespace {

void check_logits(const float * logits, int32_t n_vocab) {
    pf::require(n_vocab >= 1, "n_vocab must be at least 1");
    pf::require(logits, "logits must not be NULL");
    pf::require(pf::usable_logits(logits, n_vocab), "logits must hold no NaN and no +inf, and not only -inf");
}

// Checks what the caller passed.
pf::Chooser make_chooser(const float * logits, int32_t n_vocab, const pf_generate_params * params, const int32_t * ids,
                         uint64_t n_ids, uint64_t n_output) {
    check_logits(logits, n_vocab);
    pf::require(params, "params must not be NULL");
    pf::require(params->size == sizeof(pf_generate_params),
                "params.size is wrong; fill params with pf_generate_params_default() first");
    pf::require(ids || n_ids == 0, "ids must not be NULL where n_ids is not 0");
    pf::require(n_output <= n_ids, "n_output must not be more than n_ids");
    pf::require(std::all_of(ids, ids + n_ids, [&](int32_t id) { return id >= 0 && id < n_vocab; }),
                "ids must be within the vocabulary");
    pf::Chooser chooser(n_vocab);
    chooser.configure(*params);
    chooser.counts.append(ids, n_ids - n_output);
    std::for_each(ids + (n_ids - n_output), ids + n_ids, [&](int32_t id) { chooser.counts.say(id); });
    return chooser;
}

} // namespace

int pf_top_k(const float * logits, int32_t n_vocab, int32_t k, int32_t * ids, float * logp) {
    return pf::guard([&] {
        check_logits(logits, n_vocab);
        pf::require(k >= 1 && k <= n_vocab, "k must be 1 to n_vocab");
        pf::require(ids && logp, "ids and logp must not be NULL");
        pf::top_k(logits, n_vocab, k, ids, logp);
    });
}

int pf_copy_matches(const int32_t * before, int64_t n_before, const int32_t * tokens, int64_t n, int64_t first,
                    int64_t * at, int32_t * length) {
    return pf::guard([&] {
        pf::require(n_before >= 0 && n >= 0 && std::max(n_before, n) <= INT32_MAX,
                    "n and n_before must be 0 to 2^31 - 1");
        pf::require(first >= 0 && first <= n, "first must be 0 to n");
        pf::require((n_before == 0 || before) && (n == 0 || tokens), "before and tokens must not be NULL");
        pf::require(first == n || (at && length), "the output arrays must not be NULL");
        pf::CopyIndex index(std::max(n_before, n));
        index.grow(before, n_before);
        const auto ends = std::mismatch(before, before + n_before, tokens, tokens + n);
        index.shrink(before, std::min<int64_t>(ends.first - before, first));
        index.grow(tokens, first);
        for (int64_t i = first; i < n; ++i) {
            index.grow(tokens, i + 1);
            const pf::Match match = index.match(tokens);
            at[i - first] = match.at;
            length[i - first] = match.length;
        }
    });
}

static_assert(pf::Calibration::n_weights == PF_N_WEIGHTS, "pydflash.h says how many there are");

int pf_calibrate(const int32_t * depth, const int32_t * deviations, const float * logp, const int32_t * chosen,
                 int64_t n, int32_t n_rank, pf_calibration * out) {
    return pf::guard([&] {
        pf::require(out, "out must not be NULL");
        pf::require(n >= 0 && n_rank >= 1, "n must not be negative, and n_rank at least 1");
        pf::require(n == 0 || (depth && deviations && logp && chosen), "the arrays must not be NULL");
        pf::Calibrator calibrator;
        for (int64_t i = 0; i < n; ++i) {
            const float * row = logp + i * n_rank;
            pf::require(depth[i] >= 1 && deviations[i] >= 0, "depth must be at least 1, deviations at least 0");
            pf::require(chosen[i] >= -1 && chosen[i] < n_rank, "chosen must be a rank, or -1");
            pf::require(std::all_of(row, row + n_rank, [](float x) { return std::isfinite(x); }),
                        "logp must be finite");
            calibrator.see(depth[i], deviations[i], row, n_rank, chosen[i]);
        }
        const auto & weight = calibrator.learned().weight;
        std::copy(weight.begin(), weight.end(), out->weight);
    });
}

int pf_tree_build(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank, int32_t budget,
                  int32_t shape, const pf_calibration * calibration, int32_t root_token, const pf_line * line,
                  pf_allowed allowed, void * user, int32_t * token, int32_t * parent, int32_t * depth, int32_t * rank,
                  float * score, int32_t * n_nodes) {
    return pf::guard([&] {
        pf::require(token && parent && depth && rank && score && n_nodes, "the output arrays must not be NULL");
        pf::Line along;
        if (line) {
            pf::require(line->n >= 0 && line->n < PF_MAX_NODES, "a line must have 0 to 63 tokens");
            pf::require(line->n == 0 || (line->token && line->logp), "a line needs its tokens and logp");
            along.n = line->n;
            std::copy_n(line->token, line->n, along.token);
            std::copy_n(line->logp, line->n, along.logp);
        }
        pf::Allowed ask;
        if (allowed) {
            ask = [&](const int32_t * path, int32_t n) { return allowed(user, path, n) != 0; };
        }
        pf::Calibration weights;
        if (calibration) {
            std::copy_n(calibration->weight, pf::Calibration::n_weights, weights.weight.begin());
        }
        pf::Tree tree;
        pf::build_tree(ids, logp, n_depth, n_rank, budget, shape, calibration ? &weights : nullptr, root_token,
                       line ? &along : nullptr, ask, tree);
        std::copy_n(tree.token, tree.n_nodes, token);
        std::copy_n(tree.parent, tree.n_nodes, parent);
        std::copy_n(tree.depth, tree.n_nodes, depth);
        std::copy_n(tree.rank, tree.n_nodes, rank);
        std::copy_n(tree.score, tree.n_nodes, score);
        *n_nodes = tree.n_nodes;
    });
}

int pf_sample(const float * logits, int32_t n_vocab, const pf_generate_params * params, const int32_t * ids,
              uint64_t n_ids, uint64_t n_output, int64_t position, int32_t * token) {
    return pf::guard([&] {
        pf::require(position >= 0, "position must not be negative");
        pf::require(token, "token must not be NULL");
        *token = make_chooser(logits, n_vocab, params, ids, n_ids, n_output).choose(logits, position, nullptr);
    });
}

int pf_sample_probs(const float * logits, int32_t n_vocab, const pf_generate_params * params, const int32_t * ids,
                    uint64_t n_ids, uint64_t n_output, double * probs) {
    return pf::guard([&] {
        pf::require(probs, "probs must not be NULL");
        make_chooser(logits, n_vocab, params, ids, n_ids, n_output).probs(logits, probs);
    });
}
