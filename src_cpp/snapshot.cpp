#include "snapshot.h"

#include <cstring>

#include "error.h"

namespace pf {

namespace {

struct Header {
    int64_t n;     // committed tokens
    uint64_t hash; // of their ids
};

Header header_of(const int32_t * ids, int64_t n) {
    uint64_t hash = 0xcbf29ce484222325; // FNV-1a, an id at a time
    for (int64_t i = 0; i < n; ++i) {
        hash = (hash ^ (uint32_t) ids[i]) * 0x100000001b3;
    }
    return {n, hash};
}

struct Piece {
    ggml_tensor * tensor;
    size_t offset, bytes;
};

// Of the state that n committed tokens leave behind.
std::vector<Piece> pieces_of(const Caches & caches, int64_t n) {
    std::vector<Piece> pieces;
    for (const auto * tensors : {&caches.state.s, &caches.state.conv}) {
        for (ggml_tensor * t : *tensors) {
            pieces.push_back({t, 0, ggml_nbytes(t)});
        }
    }
    if (caches.draft) {
        const size_t first = (size_t) caches.draft->slot(0), used = (size_t) std::min(n, caches.draft->n_ring);
        for (const auto * tensors : {&caches.draft->k, &caches.draft->v}) {
            for (ggml_tensor * t : *tensors) {
                pieces.push_back({t, first * t->nb[1], used * t->nb[1]});
            }
        }
    }
    return pieces;
}

// Tensors over bytes of other tensors: a backend copies whole tensors only.
class ByteViews {
  public:
    ByteViews() : ctx_(ggml_init({2 * ggml_tensor_overhead(), nullptr, true})) {
        if (!ctx_) {
            throw Error(PF_ERR_MEMORY, "no memory for a table of tensors");
        }
    }
    ~ByteViews() { ggml_free(ctx_); }
    ByteViews(const ByteViews &) = delete;
    ByteViews & operator=(const ByteViews &) = delete;

    void copy(const ggml_tensor * from, ggml_tensor * to, size_t offset, size_t bytes) {
        if (bytes > 0) {
            ggml_reset(ctx_);
            ggml_tensor * source = view(from, offset, bytes);
            ggml_backend_tensor_copy(source, view(to, offset, bytes));
        }
    }

  private:
    ggml_tensor * view(const ggml_tensor * t, size_t offset, size_t bytes) {
        ggml_tensor * v = ggml_new_tensor_1d(ctx_, GGML_TYPE_I8, (int64_t) bytes);
        ggml_backend_tensor_alloc(t->buffer, v, (char *) t->data + offset);
        return v;
    }

    ggml_context * ctx_;
};

} // namespace

int32_t n_kv_tensors(const Caches & caches) {
    return (int32_t) (caches.state.k.size() + caches.state.v.size());
}

ggml_tensor * kv_tensor(const Caches & caches, int32_t i) {
    return (i % 2 == 0 ? caches.state.k : caches.state.v)[(size_t) i / 2];
}

uint64_t state_bytes(const Caches & caches, int64_t n) {
    uint64_t total = sizeof(Header);
    for (const Piece & p : pieces_of(caches, n)) {
        total += p.bytes;
    }
    return total;
}

void get_state(const Caches & caches, const int32_t * ids, int64_t n, void * out) {
    const Header header = header_of(ids, n);
    std::memcpy(out, &header, sizeof(header));
    char * at = (char *) out + sizeof(header);
    for (const Piece & p : pieces_of(caches, n)) {
        ggml_backend_tensor_get(p.tensor, at, p.offset, p.bytes);
        at += p.bytes;
    }
}

void set_state(const Caches & caches, int64_t n, const void * state) {
    const char * at = (const char *) state + sizeof(Header);
    for (const Piece & p : pieces_of(caches, n)) {
        ggml_backend_tensor_set(p.tensor, at, p.offset, p.bytes);
        at += p.bytes;
    }
}

bool is_state_of(const void * state, const int32_t * ids, int64_t n) {
    const Header header = header_of(ids, n);
    return std::memcmp(state, &header, sizeof(header)) == 0;
}

void copy_timeline(const Caches & from, const Caches & to, int64_t n) {
    ByteViews views;
    for (int32_t i = 0; i < n_kv_tensors(from); ++i) {
        ggml_tensor * rows = kv_tensor(from, i);
        views.copy(rows, kv_tensor(to, i), 0, (size_t) n * rows->nb[1]);
    }
    const std::vector<Piece> pieces = pieces_of(from, n), places = pieces_of(to, n);
    for (size_t i = 0; i < pieces.size(); ++i) {
        views.copy(pieces[i].tensor, places[i].tensor, pieces[i].offset, pieces[i].bytes);
    }
}

} // namespace pf
