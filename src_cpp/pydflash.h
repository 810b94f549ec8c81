/* pydflash.h: the whole C interface of libpydflash.
 *
 * A model (pf_model: target, pf_draft: drafter) is immutable memory-mapped weights; any number of sessions may share
 * one, and each keeps what it needs of it alive. A session (pf_session) is one timeline of tokens: KV cache, recurrent state, drafter
 * cache, sampler settings. Between calls a session stands at n committed tokens plus at most one pending token, which has
 * been chosen but not yet evaluated.
 *
 * Threads: different sessions may be used from different threads at once; one session from one thread at a time.
 *
 * Errors: a function that can fail returns PF_OK or a PF_ERR_* status; pf_last_error() then gives the sentence for the
 * calling thread. Nothing here throws, aborts or exits on data. After an error a session stands where it stood, or is
 * reset when the sentence says so.
 *
 * Options structs begin with their own size: fill them with the matching *_default() first, then change fields.
 * Arrays are row-major, the last index running fastest. Strings are UTF-8.
 */
#ifndef PYDFLASH_H
#define PYDFLASH_H

#include <stddef.h>
#include <stdint.h>

#ifndef PF_API
#define PF_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define PF_ABI_VERSION 5
#define PF_MAX_NODES 64 /* tree nodes a verify pass can hold, the root included */

enum {
    PF_OK = 0,
    PF_ERR_ARGUMENT = 1,    /* a value the caller passed */
    PF_ERR_FILE = 2,        /* a file that cannot be opened or read */
    PF_ERR_FORMAT = 3,      /* a malformed file; the sentence names file, field and offset */
    PF_ERR_UNSUPPORTED = 4, /* a well-formed file that this runtime does not run */
    PF_ERR_MISMATCH = 5,    /* drafter and target do not belong together */
    PF_ERR_MEMORY = 6,      /* an allocation that did not fit */
    PF_ERR_CONTEXT = 7,     /* n_ctx is used up */
    PF_ERR_STATE = 8,       /* calls in an order that cannot be */
    PF_ERR_INTERNAL = 9,    /* a bug of ours, or the backend failed */
    PF_ERR_DEVICE = 10      /* a device that is not there, or cannot be used; the sentence says why */
};

PF_API int pf_abi_version(void);
PF_API const char * pf_last_error(void); /* of this thread; valid until its next failing call */

/* ---- GGUF files: checked reading of metadata and tensor headers --------------------------------------------- */

typedef struct pf_gguf pf_gguf;

typedef struct pf_tensor_info {
    const char * name; /* owned by the pf_gguf */
    int32_t type;      /* ggml_type */
    int64_t ne[4];     /* ggml order: ne[0] runs fastest */
    uint64_t offset;   /* bytes from the start of the file */
    uint64_t size;     /* bytes */
} pf_tensor_info;

PF_API int pf_gguf_open(const char * path, pf_gguf ** out);
PF_API void pf_gguf_free(pf_gguf * gguf);
PF_API uint64_t pf_gguf_n_keys(const pf_gguf * gguf);
PF_API const char * pf_gguf_key(const pf_gguf * gguf, uint64_t index);
/* Value type of a key (gguf's numbering: 8 string, 9 array, ...), -1 when absent; element type for an array. */
PF_API int pf_gguf_type(const pf_gguf * gguf, const char * key);
PF_API int pf_gguf_array_type(const pf_gguf * gguf, const char * key);
PF_API int pf_gguf_get_int(const pf_gguf * gguf, const char * key, int64_t * out); /* any integer type or bool */
PF_API int pf_gguf_get_float(const pf_gguf * gguf, const char * key, double * out);
PF_API int pf_gguf_get_string(const pf_gguf * gguf, const char * key, const char ** out, uint64_t * n_bytes);
/* Numbers and bools as they lie in the file (little-endian, packed). */
PF_API int pf_gguf_get_array(const pf_gguf * gguf, const char * key, const void ** data, uint64_t * n);
/* All strings joined in one blob; string i is blob[offsets[i]] .. blob[offsets[i + 1]] (n + 1 offsets). */
PF_API int pf_gguf_get_strings(const pf_gguf * gguf, const char * key, const char ** blob, const uint64_t ** offsets,
                               uint64_t * n);
PF_API uint64_t pf_gguf_n_tensors(const pf_gguf * gguf);
PF_API int pf_gguf_tensor(const pf_gguf * gguf, uint64_t index, pf_tensor_info * out);

/* ---- quantisation (for tools that write model files) --------------------------------------------------------- */

PF_API int pf_type_from_name(const char * name);         /* ggml's names ("f16", "q4_K", ...); -1 when unknown */
PF_API const char * pf_type_name(int type);              /* NULL when unknown */
PF_API int64_t pf_row_size(int type, int64_t n_per_row); /* bytes; -1 when the type or length does not allow it */
PF_API int pf_quantize(int type, const float * src, int64_t n_per_row, int64_t n_rows, void * dst, uint64_t dst_size);
PF_API int pf_dequantize(int type, const void * src, uint64_t src_size, int64_t n_values, float * dst);

/* ---- devices ------------------------------------------------------------------------------------------------- */

typedef struct pf_device_info {
    uint32_t size;
    int32_t is_cuda;    /* 0: the CPU */
    uint64_t n_bytes;   /* of its memory */
    uint64_t n_free;    /* of those, now */
    char name[128];     /* as its maker calls it */
    char why_cpu[1024]; /* for "auto": why it is the CPU though a CUDA backend is installed, else empty */
} pf_device_info;

/* "cpu", "cuda" (the first CUDA device; CUDA_VISIBLE_DEVICES chooses among several), or "auto": "cuda" where that can be
 * had, else "cpu". PF_ERR_DEVICE when "cuda" cannot be had. NULL stands for "auto". */
PF_API int pf_device_get_info(const char * device, pf_device_info * out);

/* ---- models -------------------------------------------------------------------------------------------------- */

typedef struct pf_model pf_model;
typedef struct pf_draft pf_draft;

typedef struct pf_model_info {
    uint32_t size;
    int32_t n_vocab;
    int32_t n_embd;
    int32_t n_layer;     /* trunk layers; an MTP block is not counted */
    int32_t n_ctx_train; /* the context length the file states */
    uint64_t n_params;
    uint64_t n_bytes; /* of weights used */
} pf_model_info;

typedef struct pf_draft_info {
    uint32_t size;
    int32_t n_layer;
    int32_t block_size;
    int32_t mask_token_id;
    int32_t n_taps;
    int32_t taps[32]; /* as target_layers counts: tap k is the input of layer k */
    uint64_t n_params;
    uint64_t n_bytes;
} pf_draft_info;

/* Sessions live where their target does. On the CPU weights are the mapped file; a CUDA device gets a copy, and what does
 * not fit into its free memory is refused (PF_ERR_MEMORY) before anything is copied. */
PF_API int pf_model_open(const char * path, const char * device, pf_model ** out);
PF_API void pf_model_free(pf_model * model);
PF_API int pf_model_get_info(const pf_model * model, pf_model_info * out);
/* The drafter is checked against the target it will serve: width, vocabulary, tapped layers. It goes where the target is. */
PF_API int pf_draft_open(const char * path, const pf_model * target, pf_draft ** out);
PF_API void pf_draft_free(pf_draft * draft);
PF_API int pf_draft_get_info(const pf_draft * draft, pf_draft_info * out);

/* ---- sessions ------------------------------------------------------------------------------------------------ */

typedef struct pf_session pf_session;

typedef struct pf_session_params {
    uint32_t size;
    /* Tokens the session can hold, at most what the model was trained for. 0: the largest context that leaves a
     * twentieth of the free memory. */
    int32_t n_ctx;
    /* ggml_types of the K and V cache: f32, f16, q8_0 or q4_0. -1: the first of f16 and q8_0 with which n_ctx leaves a
     * twentieth of the free memory, else q4_0. */
    int32_t type_k;
    int32_t type_v;
    int32_t n_batch;   /* prefill chunk in tokens, 64 to 4096 in steps of 64 */
    int32_t n_ring;    /* positions the drafter can attend to: slots of its context K/V ring */
    int32_t n_threads; /* 0: one per core this process may use */
    /* Largest tree, in nodes besides the root, 0 to 63, to set memory aside for; a run may ask for more. PF_BUDGET_AUTO: 63,
     * or 0 without a drafter. */
    int32_t budget;
} pf_session_params;

/* The size of each step's tree is the one with the most expected tokens a second; where nothing pays, a root alone. */
enum { PF_BUDGET_AUTO = -1 };

enum { PF_SHAPE_TREE = 0, PF_SHAPE_CHAIN = 1 };
#define PF_MAX_LOGPROBS 20

typedef struct pf_generate_params {
    uint32_t size;
    int32_t budget;    /* tree nodes besides the root, 0 to 63; 0 is plain decoding; or PF_BUDGET_AUTO */
    int32_t shape;     /* PF_SHAPE_*: a chain is a tree without branches */
    float temperature; /* 0: greedy */
    int32_t top_k;     /* 0: off */
    float top_p;       /* 1: off */
    float min_p;       /* 0: off */
    uint64_t seed;
    const int32_t * stop_ids; /* copied */
    uint64_t n_stop_ids;
    /* Before all of the above, in this order: the bias is added to the logits; the repetition penalty (Keskar et al. 2019)
     * divides a positive logit of a token on the timeline and multiplies any other; from a token of the output, which is
     * what was said since the last append or configure, are taken off presence_penalty and frequency_penalty times how
     * often it came. In a tree the tokens on the way to a node count as said. */
    const int32_t * bias_ids; /* copied; each once */
    const float * bias;       /* [n_bias]: -1000 to 1000, or -inf: never this token */
    uint64_t n_bias;
    float repeat_penalty;    /* 1: off; 0.01 to 100 */
    float presence_penalty;  /* 0: off; -100 to 100 */
    float frequency_penalty; /* 0: off; -100 to 100 */
    int32_t n_logprobs;      /* likeliest tokens to report with each, 0 to PF_MAX_LOGPROBS; -1: report nothing */
    /* 1: where the last tokens stood on the timeline before, what followed there shares the tree with what is drafted.
     * 0: nothing is copied. */
    int32_t copying;
} pf_generate_params;

/* What one step did. Times are milliseconds. */
typedef struct pf_step_result {
    uint32_t size;
    int32_t n_tokens; /* tokens the target said in this step, at least 1 */
    int32_t tokens[PF_MAX_NODES];
    int32_t n_nodes;   /* real nodes in the verified tree, the root included */
    int32_t max_depth; /* depth of the tree offered; the root has 0 */
    int32_t stopped;   /* 1: the last token is one of stop_ids */
    int32_t n_copied;  /* tokens, from the first on, that copying had proposed, drafted as well or not */
    double expected;   /* tokens that the tree promised: 1, and the chance of every node as the builder had it */
    double draft_ms, build_ms, verify_ms, accept_ms;
} pf_step_result;

/* What passes have moved and built since the session was opened. */
typedef struct pf_counters {
    uint32_t size;
    uint64_t n_set; /* copies from the host to where the session computes */
    uint64_t bytes_set;
    uint64_t n_get; /* and back */
    uint64_t bytes_get;
    uint64_t graphs_built; /* a graph is built once for its shape, and again when it has long not been used */
    uint64_t graph_runs;
    uint64_t buffers; /* allocated after opening: for a run whose budget is above the session's, for looking inside */
} pf_counters;

/* ---- memory ---------------------------------------------------------------------------------------------------- */

enum {
    PF_ROW_COUNTED = 0, /* of our own buffers: what is allocated, to the byte */
    PF_ROW_ASSUMED = 1, /* of what others keep, and of graphs kept: estimated, or a bound; part of the total too */
    PF_ROW_ASIDE = 2    /* not part of the total: a graph's share of the compute buffer, the memory of another device */
};
#define PF_MAX_ROWS 24

typedef struct pf_plan_row {
    const char * name; /* static */
    int32_t kind;      /* PF_ROW_* */
    uint64_t n_bytes;
} pf_plan_row;

/* What a session takes. n_ctx and KV types in params are those chosen where they were left open. */
typedef struct pf_plan {
    uint32_t size;
    int32_t on_cuda;
    int32_t fits;
    int32_t n_rows;
    pf_session_params params;
    uint64_t total; /* bytes */
    uint64_t free;  /* there for all of it, the weights included */
    pf_plan_row rows[PF_MAX_ROWS];
    char advice[1024]; /* what would fit, when this does not */
} pf_plan;

/* Plans a session without opening it; the models' headers are enough, and models opened on the CPU serve for both devices.
 * device: "cpu", or "cuda" for a card of n_free bytes, whether there is one or not. n_free 0: what the device has free. */
PF_API int pf_plan_make(const pf_model * target, const pf_draft * draft /* may be NULL */,
                        const pf_session_params * params, const char * device, uint64_t n_free, pf_plan * out);
/* What a session was opened with. Opening one that does not fit is PF_ERR_MEMORY, before anything is allocated. */
PF_API int pf_session_get_plan(const pf_session * session, pf_plan * out);
/* What a session has allocated: the same rows, those of its own buffers alone. */
PF_API int pf_session_get_memory(const pf_session * session, pf_plan * out);

PF_API void pf_session_params_default(pf_session_params * params);
PF_API void pf_generate_params_default(pf_generate_params * params);
PF_API int pf_session_open(const pf_model * target, const pf_draft * draft /* may be NULL */,
                           const pf_session_params * params, pf_session ** out);
PF_API void pf_session_free(pf_session * session);
PF_API int pf_session_reset(pf_session * session); /* back to the empty timeline */
PF_API int pf_session_n_ctx(const pf_session * session);
PF_API int64_t pf_session_n_tokens(const pf_session * session); /* committed plus pending */
PF_API int pf_session_counters(const pf_session * session, pf_counters * out);

/* Extends the timeline. Everything but the last token is evaluated, in chunks that end at multiples of n_batch; the last
 * one becomes pending. Give few tokens a call to show progress or to be interruptible in between: up to a multiple of
 * n_batch and one more, and all is computed as in one call. */
PF_API int pf_session_append(pf_session * session, const int32_t * ids, uint64_t n);

/* Settings for the steps that follow. */
PF_API int pf_session_configure(pf_session * session, const pf_generate_params * params);
/* What may be said, asked of the caller in every step, on the thread that steps. A path is the n tokens behind the pending
 * one on the way to a node, 0 to PF_MAX_NODES - 1 of them. An answer below 0 is a failure of the caller's: the step then
 * fails with PF_ERR_STATE. */
typedef struct pf_constraint {
    uint32_t size;
    int32_t n_vocab; /* tokens that it knows; the others are forbidden */
    void * user;     /* given back in every call */
    /* Sets bit id % 32 of bits[id / 32] for every token that may come next; [(n_vocab + 31) / 32], all 0 before. Temperature,
     * filters and penalties see the tokens allowed alone. */
    int (*mask)(void * user, const int32_t * path, int32_t n, uint32_t * bits);
    /* 1: the path, n >= 1, may be said; 0: not its last token, all before it may. */
    int (*allowed)(void * user, const int32_t * path, int32_t n);
    /* Writes the tokens, `most` at most, that must come next, and returns how many: a guess that costs nothing but a place in
     * the tree. */
    int (*forced)(void * user, int32_t * out, int32_t most);
} pf_constraint;

/* For the steps that follow, until another takes its place; NULL: everything may be said. Resetting, rewinding and copying
 * do not touch it: what it says must fit the timeline. */
PF_API int pf_session_constrain(pf_session * session, const pf_constraint * constraint);
/* Draft, build the tree, verify it in one target pass, accept. At most max_tokens tokens come back. */
PF_API int pf_session_step(pf_session * session, int32_t max_tokens, pf_step_result * out);
/* Commits the first n_keep (1 to n_tokens) tokens of the last step; what follows them never happened. Each step must be
 * committed before the next call that moves the timeline; reset forgets it. commit_ms may be NULL. */
PF_API int pf_session_commit(pf_session * session, int32_t n_keep, double * commit_ms);
/* Of each of the last step's n_tokens tokens, until the next step: its log-probability, and the n_logprobs likeliest tokens
 * in its place with theirs, likeliest first, ties by lowest id; [n_tokens] and twice [n_tokens, n_logprobs]. It is the
 * model's own log-softmax over the whole vocabulary: bias, penalties, temperature, filters and masks are not in it.
 * PF_ERR_STATE when that step was not asked for them. */
PF_API int pf_session_logprobs(const pf_session * session, float * logp, int32_t * top_ids, float * top_logp);

/* Going back, keeping and moving. A step must have been committed before any of these, else PF_ERR_STATE. What they refuse
 * they refuse before anything is touched.
 *
 * A timeline is token ids, KV rows and a state. KV rows stay where they are; the state (recurrent and convolution state,
 * the drafter's context ring) changes with every token and is lost unless it is kept. */

/* Tokens [first, first + n) of the timeline; the pending one comes last. */
PF_API int pf_session_get_tokens(const pf_session * session, int64_t first, int64_t n, int32_t * out);
PF_API int64_t pf_session_n_committed(const pf_session * session); /* n_tokens, or one less when a token is pending */
/* The state of the committed tokens, and its size for n of them; 0 for a negative n. Host byte order. */
PF_API uint64_t pf_session_state_bytes(const pf_session * session, int64_t n);
PF_API int pf_session_get_state(pf_session * session, void * out, uint64_t size);
/* Back to the first n committed tokens, with the state that get_state gave when the session stood there; nothing is
 * pending then. PF_ERR_ARGUMENT for a state that is not that of these tokens. For n = 0, and to drop
 * no more than the pending token, no state is needed. */
PF_API int pf_session_rewind(pf_session * session, int64_t n, const void * state, uint64_t size);
/* KV rows of the committed tokens, a tensor at a time: size is n * kv_row_bytes (0 where there is no such tensor). */
PF_API int32_t pf_session_n_kv(const pf_session * session);
PF_API uint64_t pf_session_kv_row_bytes(const pf_session * session, int32_t tensor);
PF_API int pf_session_get_kv(pf_session * session, int32_t tensor, int64_t first, int64_t n, void * out, uint64_t size);
/* A timeline from elsewhere, into a session that is empty (PF_ERR_STATE when it is not): the rows of each tensor, then ids
 * and state. Nothing is pending then. */
PF_API int pf_session_set_kv(pf_session * session, int32_t tensor, int64_t first, int64_t n, const void * rows,
                             uint64_t size);
PF_API int pf_session_restore(pf_session * session, const int32_t * ids, int64_t n, const void * state, uint64_t size);
/* The timeline and settings of another session take the place of one's own, from device to device. PF_ERR_MISMATCH unless
 * both have the same models, KV types, n_ring and n_batch; PF_ERR_CONTEXT when n_ctx is too small. */
PF_API int pf_session_copy(pf_session * to, pf_session * from);

/* What a session knows of speed. Whatever it is, the same tokens are said. */

/* Where this session is deep into its context now: milliseconds of a pass over so many nodes with its commit, and of a
 * draft of a whole block; measured on the first call, and by PF_BUDGET_AUTO, for every doubling of the context. Some token
 * must be pending. */
#define PF_N_PASSES 12
typedef struct pf_costs {
    uint32_t size;
    int32_t n_nodes[PF_N_PASSES];
    double pass_ms[PF_N_PASSES];
    double draft_ms; /* 0 without a drafter */
} pf_costs;
PF_API int pf_session_get_costs(pf_session * session, pf_costs * out);
/* All of it, learned calibration included, for a later session of the same models, device and settings. Host byte order;
 * the size is constant. With a budget that is set, runs are the same whatever was learned. PF_ERR_FORMAT for what is not of this version, or cannot be. */
PF_API uint64_t pf_session_experience_bytes(void);
PF_API int pf_session_get_experience(const pf_session * session, void * out, uint64_t size);
PF_API int pf_session_set_experience(pf_session * session, const void * experience, uint64_t size);
/* For measurements: a line of n tokens, at most 63, for the next step's tree in the place of what copying would propose,
 * taken for certain. PF_ERR_ARGUMENT for what is no token. */
PF_API int pf_session_propose(pf_session * session, const int32_t * ids, int32_t n);

/* For anyone who wants to check us. Each replaces the timeline and leaves it empty. n is at most n_ctx. */
PF_API int pf_session_logits(pf_session * session, const int32_t * ids, uint64_t n, float * out /* [n, n_vocab] */);
PF_API int pf_session_hidden(pf_session * session, const int32_t * ids, uint64_t n, const int32_t * layers,
                             int32_t n_layers, float * out /* [n, n_layers, n_embd] */);
PF_API int pf_session_draft_logits(pf_session * session, const int32_t * ids, uint64_t n,
                                   float * out /* [block_size - 1, n_vocab] */);

/* ---- the parts of a step, by themselves ---------------------------------------------------------------------- */

/* Exact log-probabilities (log-softmax over the whole row) of the k likeliest tokens, likeliest first, ties by id. */
PF_API int pf_top_k(const float * logits, int32_t n_vocab, int32_t k, int32_t * ids, float * logp);

/* How often the drafter proves right, learned: weights of a logistic regression. The log-odds that the target chooses a
 * drafted token, when the path above it was accepted, are the sum of the weights times
 *   1, o, f, f o, log(1 + r), (1 - f) log(1 - p0), [d > 1], log d, o log d, log(1 + v), o log(1 + v), f log(1 + v)
 * where p is the drafter's probability of the token (1 - 1e-4 at most) and o its log-odds, r its rank and f 1 for rank 0,
 * p0 the probability of rank 0, d the depth (1 below the root), and v the number of tokens of other ranks above it, up to
 * 3. No rank counts for more than the one before it. NULL everywhere below: the drafter's probabilities as they are. */
#define PF_N_WEIGHTS 12
typedef struct pf_calibration {
    double weight[PF_N_WEIGHTS];
} pf_calibration;

/* What a session learns from n visited nodes, in this order: depth, deviations (the v above) and the drafted log-probabilities
 * logp[n, n_rank] of the tokens that might come next, falling; the rank of the one that the target chose, -1 for none of
 * them. One Newton step each, from the identity on. */
PF_API int pf_calibrate(const int32_t * depth, const int32_t * deviations, const float * logp, const int32_t * chosen,
                        int64_t n, int32_t n_rank, pf_calibration * out);

/* A line of tokens below the root that is proposed besides the drafter's: what followed when the last tokens were said
 * before, or what a grammar forces. */
typedef struct pf_line {
    int32_t n;             /* at most PF_MAX_NODES - 1; may be deeper than the drafter's block */
    const int32_t * token; /* [n] */
    const float * logp;    /* [n], of each, those before it taken as accepted; 0: certain */
} pf_line;

/* Whether path[0, n), the tokens from below the root down to a candidate, may be said (not 0). Asked of a node that is to
 * be taken, when all above it were. */
typedef int (*pf_allowed)(void * user, const int32_t * path, int32_t n);

/* DDTree: the likeliest prefix-closed set of `budget` nodes besides the root, best first over cumulative
 * log-probability. ids and logp are [n_depth, n_rank], row d for depth d + 1, ranks in falling order.
 * In a node on the line's path (line may be NULL) the line's next token is a child too, with the better of the line's
 * probability and the drafter's where the drafter has it as well, placed among its siblings by that, before those it ties
 * with. Where the line's is the better, the siblings share what it leaves in proportion to what they had. Ties go by the
 * tuple of places among siblings along the path. A chain takes the likeliest child of each node. What is not `allowed`
 * (NULL: everything is) is left out, and its next sibling takes its place.
 * Nodes come numbered: root 0, then the path of the likeliest children in order (without a line: the rank-0 path), then
 * the rest, parents before children. Outputs hold PF_MAX_NODES entries: token (root's: root_token), parent (-1 for the
 * root), depth, rank (-1 for a token that only the line has), score (cumulative calibrated log-probability, 0 for the
 * root). */
PF_API int pf_tree_build(const int32_t * ids, const float * logp, int32_t n_depth, int32_t n_rank, int32_t budget,
                         int32_t shape, const pf_calibration * calibration, int32_t root_token, const pf_line * line,
                         pf_allowed allowed, void * user, int32_t * token, int32_t * parent, int32_t * depth,
                         int32_t * rank, float * score, int32_t * n_nodes);

/* Where the last tokens of a timeline stood before, as copying finds it (3 tokens at least; matches count up to 32): for
 * each i in [first, n) the end of the longest match of tokens[0, i + 1)'s end with what stands before, the latest of equals
 * (among the positions looked at, a bounded number), at[i - first] (-1: none) and length[i - first]. The timeline
 * was `before` first, and went back to what the two have in common. */
PF_API int pf_copy_matches(const int32_t * before, int64_t n_before, const int32_t * tokens, int64_t n, int64_t first,
                           int64_t * at, int32_t * length);

/* The target's choice from one row of logits at a position of the timeline: argmax (ties: lowest id) at temperature 0,
 * else the one draw that (seed, position) stand for. ids [n_ids] are the tokens that penalties see, the last n_output of
 * them output; n_ids may be 0. */
PF_API int pf_sample(const float * logits, int32_t n_vocab, const pf_generate_params * params, const int32_t * ids,
                     uint64_t n_ids, uint64_t n_output, int64_t position, int32_t * token);
/* The distribution pf_sample draws from. */
PF_API int pf_sample_probs(const float * logits, int32_t n_vocab, const pf_generate_params * params,
                           const int32_t * ids, uint64_t n_ids, uint64_t n_output, double * probs /* [n_vocab] */);

#ifdef __cplusplus
}
#endif

#endif
