#include "backend.h"

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <vector>

#include "error.h"
#include "ggml.h"

namespace fs = std::filesystem;

namespace pf {

namespace {

thread_local std::string ggml_log;

void keep_log(ggml_log_level level, const char * text, void *) {
    // A continuation belongs to whatever came before it, so it is kept only after something that was.
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR ||
        (level == GGML_LOG_LEVEL_CONT && !ggml_log.empty())) {
        ggml_log += text;
    }
}

// When the library is loaded: reading a file can make ggml complain before any backend is.
const bool log_is_ours = (ggml_log_set(keep_log, nullptr), true);

struct Close {
    void operator()(void * handle) const { dlclose(handle); }
};
using Handle = std::unique_ptr<void, Close>;

fs::path own_folder() {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<const void *>(&cpu_device), &info) || !info.dli_fname) {
        throw Error(PF_ERR_INTERNAL, "Cannot tell which file libpydflash was loaded from.");
    }
    std::error_code error;
    const fs::path file = fs::canonical(info.dli_fname, error);
    if (error) {
        throw Error(PF_ERR_INTERNAL,
                    std::string("Cannot find libpydflash at ") + info.dli_fname + ": " + error.message());
    }
    return file.parent_path();
}

// All CPU libraries in the folder; a build for one machine has one, a wheel to give away one per generation.
std::vector<fs::path> cpu_libraries(const fs::path & folder) {
    std::vector<fs::path> found;
    for (const fs::directory_entry & entry : fs::directory_iterator(folder)) {
        const std::string name = entry.path().filename().string();
        if (name.rfind("libpydflash-ggml-cpu", 0) == 0 && entry.path().extension() == ".so") {
            found.push_back(entry.path());
        }
    }
    std::sort(found.begin(), found.end());
    return found;
}

ggml_backend_reg_t load_cpu() {
    const fs::path folder = own_folder();
    fs::path best;
    int best_score = 0;
    std::string refused;
    for (const fs::path & path : cpu_libraries(folder)) {
        const Handle handle(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL));
        if (!handle) {
            const char * reason = dlerror();
            refused += std::string(" ") + (reason ? reason : path.c_str()) + ".";
            continue;
        }
        // 0: this processor lacks an instruction the library uses. Where upstream has no test, it runs.
        const auto score_of = reinterpret_cast<int (*)()>(dlsym(handle.get(), "ggml_backend_score"));
        const int score = score_of ? score_of() : 1;
        if (score == 0) {
            refused += " " + path.filename().string() + " was built for another processor.";
        }
        if (score > best_score) {
            best_score = score;
            best = path;
        }
    }
    if (best.empty()) {
        throw Error(PF_ERR_INTERNAL, "No CPU backend in " + folder.string() + " can be loaded; reinstall pydflash on " +
                                         "this machine." + refused);
    }
    take_ggml_log();
    ggml_backend_reg_t reg = ggml_backend_load(best.c_str());
    if (!reg || ggml_backend_reg_dev_count(reg) == 0) {
        throw Error(PF_ERR_INTERNAL, "The CPU backend " + best.string() + " does not fit this libpydflash; reinstall " +
                                         "pydflash. " + take_ggml_log());
    }
    return reg;
}

ggml_backend_reg_t cpu_reg() {
    static const ggml_backend_reg_t reg = load_cpu(); // a failed load throws and is tried again by the next call
    return reg;
}

struct Cuda {
    ggml_backend_dev_t device = nullptr; // null: none to be had
    std::string reason;                  // why not
    bool installed = false;
};

Cuda load_cuda() {
    Cuda cuda;
    const fs::path path = own_folder() / "libpydflash-ggml-cuda.so";
    std::error_code ignored;
    if (!fs::exists(path, ignored)) {
        cuda.reason = "this pydflash was built without its CUDA backend; 'python scripts/build_cuda.py' builds it";
        return cuda;
    }
    cuda.installed = true;
    // Loaded by hand first: ggml keeps the loader's words to itself.
    const Handle handle(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL));
    if (!handle) {
        const char * words = dlerror();
        const std::string said = words ? words : path.string();
        cuda.reason = "the CUDA backend cannot be loaded: " + said +
                      (said.rfind("libcuda.so", 0) == 0 ? "; that library comes with NVIDIA's driver"
                                                        : "; 'python scripts/cuda_toolchain.py --install' installs it");
        return cuda;
    }
    take_ggml_log();
    ggml_backend_reg_t reg = ggml_backend_load(path.c_str());
    const std::string log = take_ggml_log();
    if (!reg) {
        cuda.reason = "the CUDA backend " + path.string() + " does not fit this libpydflash; build both again. " + log;
        return cuda;
    }
    if (ggml_backend_reg_dev_count(reg) == 0) {
        cuda.reason = "the CUDA backend found no device" + (log.empty() ? "" : ": " + log);
        return cuda;
    }
    ggml_backend_dev_t device = ggml_backend_reg_dev_get(reg, 0);
    // A library holds code for the architectures it was compiled for, and an unfit one would end the process later.
    using Unfit = const char * (*)(int);
    const auto unfit = reinterpret_cast<Unfit>(dlsym(handle.get(), "pydflash_cuda_unfit"));
    const char * words = unfit ? unfit(0) : nullptr;
    if (words) {
        cuda.reason = std::string("the CUDA backend was not compiled for this machine's ") +
                      ggml_backend_dev_description(device) + " (" + words +
                      "); build it again with PYDFLASH_CUDA_ARCHITECTURES set to what this card is";
        return cuda;
    }
    cuda.device = device;
    return cuda;
}

const Cuda & cuda() {
    static const Cuda loaded = load_cuda();
    return loaded;
}

} // namespace

ggml_backend_dev_t find_device(const std::string & name) {
    if (name == "cpu" || (name == "auto" && !cuda().device)) {
        return cpu_device();
    }
    if (name != "auto" && name != "cuda") {
        throw Error(PF_ERR_ARGUMENT, "the device is '" + name + "'; it must be auto, cpu or cuda");
    }
    if (!cuda().device) {
        throw Error(PF_ERR_DEVICE, "device is 'cuda', but " + cuda().reason);
    }
    return cuda().device;
}

std::string why_auto_is_cpu() {
    return cuda().installed ? cuda().reason : "";
}

bool is_host(ggml_backend_dev_t device) {
    return ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(device));
}

ggml_backend_dev_t cpu_device() {
    return ggml_backend_reg_dev_get(cpu_reg(), 0);
}

void * cpu_proc(const char * name) {
    void * proc = ggml_backend_reg_get_proc_address(cpu_reg(), name);
    if (!proc) {
        throw Error(PF_ERR_INTERNAL, std::string("The CPU backend has no function ") + name + ".");
    }
    return proc;
}

std::string take_ggml_log() {
    std::string text;
    text.swap(ggml_log);
    while (!text.empty() && text.back() == '\n') {
        text.pop_back();
    }
    return text;
}

} // namespace pf
