// Fuzzer over the GGUF reader. Every input lies in a heap block of exactly its own size, so that the address sanitizer
// sees a read of even one byte too many, which a mapped file's last page would hide.
//
// Anything but a clean open or a pf::Error is a bug. With gcc, which brings its own mutations (seeds: valid files;
// their weights are cut off, so small ones are best):
//
//   cmake --preset dev -B build/dev && cmake --build build/dev --target ggml-base
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Isrc_cpp -Ibuild/dev/ggml-src/include
//       tests/fuzz_gguf.cpp src_cpp/gguf/*.cpp -Lbuild/dev/_pydflash -lpydflash-ggml-base
//       -Wl,-rpath,$PWD/build/dev/_pydflash -o build/fuzz_gguf
//   build/fuzz_gguf 1000000 1 seed.gguf other.gguf      (runs, random seed, files)
//
// The same seed and files give the same inputs, so a finding can be met again in a debugger.
// With clang: add -fsanitize=fuzzer -DLIBFUZZER and give a folder of seeds, as for any libFuzzer target.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "error.h"
#include "gguf/impl.h"

namespace {

// Calls a getter, which may refuse.
template <class Body>
void attempt(Body && body) {
    try {
        body();
    } catch (const pf::Error &) {
    }
}

volatile uint64_t sink; // keeps reads from being optimised away

void read_everything(const pf::GgufFile & file) {
    const auto & impl = pf::GgufAccess::impl(file);
    for (const pf::GgufValue & value : impl.contents.values) {
        attempt([&] { sink = file.get_int(value.key, -5, 1 << 20); });
        attempt([&] { sink = static_cast<uint64_t>(file.get_float(value.key) != 0); });
        attempt([&] { sink = file.get_bool(value.key, false); });
        attempt([&] { sink = file.get_string(value.key).size(); });
        attempt([&] { sink = file.get_ints(value.key).size(); });
        attempt([&] { sink = file.array_size(value.key); });
        attempt([&] { sink = impl.strings(value).text.size(); });
        sink = file.data()[value.offset + value.n_bytes - (value.offset + value.n_bytes == file.size())];
    }
    for (const pf::GgufTensor & tensor : file.tensors()) {
        sink = file.data()[tensor.offset] + file.data()[tensor.offset + tensor.size - 1];
        if (file.find(tensor.name) != &tensor) {
            std::abort();
        }
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    auto * copy = new uint8_t[size];
    std::memcpy(copy, data, size);
    const pf::Bytes bytes{std::shared_ptr<const uint8_t>(copy, std::default_delete<const uint8_t[]>()), size};
    attempt([&] { read_everything(*pf::GgufAccess::over(bytes, "fuzz.gguf")); });
    return 0;
}

#ifndef LIBFUZZER

namespace {

using Input = std::vector<uint8_t>;

class Mutator {
  public:
    explicit Mutator(uint64_t seed) : random_(seed) {}

    uint64_t below(uint64_t n) { return n ? random_() % n : 0; }

    void mutate(Input & input, const Input & other) {
        for (uint64_t n = 1 + below(4); n > 0 && !input.empty(); --n) {
            const size_t at = below(input.size());
            switch (below(7)) {
            case 0:
                input[at] ^= static_cast<uint8_t>(1u << below(8));
                break;
            case 1:
                input[at] = static_cast<uint8_t>(random_());
                break;
            case 2:
                put(input, at, 8, extreme());
                break;
            case 3:
                put(input, at, 4, extreme());
                break;
            case 4:
                input.resize(at);
                break;
            case 5:
                input.erase(input.begin() + at, input.begin() + std::min(input.size(), at + 1 + below(16)));
                break;
            default: { // a piece of another seed, so that whole keys and tensors come twice or in odd places
                const size_t from = below(other.size());
                const size_t n_bytes = std::min<size_t>(other.size() - from, 1 + below(64));
                input.insert(input.begin() + at, other.begin() + from, other.begin() + from + n_bytes);
            }
            }
        }
    }

  private:
    uint64_t extreme() {
        static const uint64_t values[] = {0,          1,          2,          8,          9,         13,
                                          0x7fffffff, 0x80000000, 0xffffffff, 1ull << 32, 1ull << 61};
        switch (below(4)) {
        case 0:
            return below(300);
        case 1:
            return 0 - below(64);
        case 2:
            return (1ull << 63) - below(3);
        default:
            return values[below(std::size(values))];
        }
    }

    static void put(Input & input, size_t at, size_t n, uint64_t value) {
        std::memcpy(input.data() + at, &value, std::min(n, input.size() - at));
    }

    std::mt19937_64 random_;
};

} // namespace

int main(int argc, char ** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: %s RUNS SEED FILE...\n", argv[0]);
        return 2;
    }
    std::vector<Input> seeds;
    for (int i = 3; i < argc; ++i) {
        std::ifstream in(argv[i], std::ios::binary);
        Input seed(std::istreambuf_iterator<char>(in), {});
        seed.resize(std::min<size_t>(seed.size(), 1 << 16));
        seeds.push_back(seed);
    }
    Mutator mutator(std::strtoull(argv[2], nullptr, 10));
    const uint64_t n_runs = std::strtoull(argv[1], nullptr, 10);
    for (uint64_t run = 0; run < n_runs; ++run) {
        Input input = seeds[mutator.below(seeds.size())];
        mutator.mutate(input, seeds[mutator.below(seeds.size())]);
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    std::printf("%llu runs, no findings\n", static_cast<unsigned long long>(n_runs));
    return 0;
}

#endif
