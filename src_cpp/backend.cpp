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

} // namespace

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
