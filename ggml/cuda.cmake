# The CUDA backend: which toolkit compiles it, and how. Included before upstream's own lists, which read what is set here.
#
# The toolkit: the one named (CUDAToolkit_ROOT, CMAKE_CUDA_COMPILER or $CUDACXX), else the Python packages of the extra
# `cuda` where this build's Python has them, else the nvcc on PATH. Without any the build stops here, with a sentence.

if(PYDFLASH_SANITIZE)
    message(FATAL_ERROR "pydflash: nvcc has no sanitizers; set either PYDFLASH_CUDA or PYDFLASH_SANITIZE.")
endif()

set(cuda_packages "nvidia/cu13/lib") # below site-packages
if(NOT CUDAToolkit_ROOT AND NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(find_toolchain "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/scripts/cuda_toolchain.py")
    execute_process(COMMAND ${find_toolchain}
        RESULT_VARIABLE failed OUTPUT_VARIABLE root ERROR_VARIABLE reason OUTPUT_STRIP_TRAILING_WHITESPACE)
    find_program(PYDFLASH_NVCC nvcc)
    if(NOT failed)
        set(CUDAToolkit_ROOT "${root}")
    elseif(PYDFLASH_NVCC)
        set(CMAKE_CUDA_COMPILER "${PYDFLASH_NVCC}")
    else()
        message(FATAL_ERROR "PYDFLASH_CUDA is ON, but there is no nvcc on PATH, and none from Python packages.\n${reason}"
            "A toolkit elsewhere can be named with -DCUDAToolkit_ROOT=<folder>.")
    endif()
endif()
if(CUDAToolkit_ROOT AND NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER "${CUDAToolkit_ROOT}/bin/nvcc")
    if(NOT EXISTS "${CMAKE_CUDA_COMPILER}")
        message(FATAL_ERROR "pydflash: CUDAToolkit_ROOT is ${CUDAToolkit_ROOT}, but ${CMAKE_CUDA_COMPILER} does not exist.")
    endif()
endif()
if(CUDAToolkit_ROOT)
    # In a build folder the library finds what it needs the same way as when installed.
    get_filename_component(folder "${PROJECT_BINARY_DIR}/${cuda_packages}" DIRECTORY)
    file(MAKE_DIRECTORY "${folder}")
    file(CREATE_LINK "${CUDAToolkit_ROOT}/lib64" "${PROJECT_BINARY_DIR}/${cuda_packages}" SYMBOLIC)
endif()

# Never "native": it asks a GPU that the machine which compiles need not have.
string(REPLACE "," ";" CMAKE_CUDA_ARCHITECTURES "${PYDFLASH_CUDA_ARCHITECTURES}")
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    if(NOT architecture MATCHES "^[0-9]+[af]?(-real|-virtual)?$")
        message(FATAL_ERROR "pydflash: '${architecture}' in PYDFLASH_CUDA_ARCHITECTURES is not an architecture; name "
            "numbers such as 86-real (RTX 3090), 89-real (RTX 4090) or 120a-real (RTX 5090), separated by commas.")
    endif()
endforeach()
if(NOT CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
    set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared) # upstream links the shared one; two runtimes in a process would not do

set(GGML_CUDA ON)
set(GGML_CUDA_FA ON)
set(GGML_CUDA_FA_QUANTS "f16-f16;q8_0-q8_0;q4_0-q4_0") # the KV types there are; a mixed pair goes by way of f16
set(GGML_CUDA_GRAPHS ON) # shapes repeat from step to step, so that graphs replay
set(GGML_CUDA_NCCL OFF) # one GPU
