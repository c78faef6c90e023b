# Builds the CUDA kernels by NVCC with the flags GENCODE, for the GPUs CUDA_ARCHS. Sets WITH_CUDA,
# CUDA_VERSION, CUDA_STATUS, CUDA_OBJECTS and CUDA_LIBRARIES. nvcc itself says where files are: it
# may be a wrapper script, or a pip package with lib, not lib64.
set(CMAKE_CUDA_COMPILER ${NVCC})
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)

# Linked statically, so that importing needs no CUDA library and no driver.
find_library(CUDART_STATIC cudart_static REQUIRED
             HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}/lib
                   ${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}/lib64)
find_package(Threads REQUIRED)
add_library(kernels_cuda OBJECT ${CUDA_SOURCES})
target_link_libraries(kernels_cuda PRIVATE snnlstm_flags)
target_compile_options(kernels_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${GENCODE}
  -Xcompiler=-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}=csrc
  --expt-relaxed-constexpr -Xfatbin=-compress-all --threads=2
  -Xcompiler=-Wall,-Wextra,-Wno-unused-parameter>)

set(WITH_CUDA 1)
set(CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
set(CUDA_STATUS "built with nvcc ${CUDA_VERSION} for sm_${CUDA_ARCHS} (${CUDA_WHY})")
set(CUDA_OBJECTS $<TARGET_OBJECTS:kernels_cuda>)
set(CUDA_LIBRARIES ${CUDART_STATIC} Threads::Threads rt)
