# Builds the CUDA kernels: machine code for those GPUs of NVCC_ARCHS that NVCC knows, and PTX for
# newer ones. Sets WITH_CUDA, CUDA_VERSION, CUDA_ARCHS, CUDA_STATUS, CUDA_OBJECTS and
# CUDA_LIBRARIES. nvcc itself says where files are: it may be a wrapper script, or a pip package
# with lib, not lib64.
execute_process(COMMAND ${NVCC} --list-gpu-arch
                OUTPUT_VARIABLE known RESULT_VARIABLE failed ERROR_VARIABLE trouble)
if(failed)
  message(FATAL_ERROR "${NVCC} --list-gpu-arch failed:\n${trouble}")
endif()
# Translating C++ to PTX takes two thirds of nvcc's time. Therefore GPUs without cp.async share one
# PTX, those with it another, and those on which launches overlap (griddepcontrol, from 9.0 on) a
# third. Each GPU still has its own machine code. The PTX of 8.0 is kept, because it serves most
# GPUs: the driver translates it for GPUs that are not listed, on which launches do not overlap.
string(REGEX MATCHALL "[0-9]+" known "${known}")
list(SORT known COMPARE NATURAL)
list(GET known -1 newest)
foreach(arch IN LISTS NVCC_ARCHS)
  if(arch IN_LIST known)
    list(APPEND archs ${arch})
    if(arch LESS 80)
      list(APPEND code75 sm_${arch})
    elseif(arch LESS 90)
      list(APPEND code80 sm_${arch})
    else()
      list(APPEND code90 sm_${arch})
    endif()
  elseif(arch GREATER newest)
    set(ptx 80)
  endif()
endforeach()
if(code80)
  set(ptx 80)
elseif(code90)
  set(ptx 90)
elseif(code75 AND NOT ptx)
  set(ptx 75)
elseif(NOT ptx)
  message(FATAL_ERROR "${NVCC} knows none of the GPUs ${NVCC_ARCHS}; it knows: ${known}")
endif()
list(APPEND code${ptx} compute_${ptx})
foreach(arch 75 80 90)
  if(code${arch})
    list(JOIN code${arch} "," code)
    list(APPEND GENCODE "-gencode=arch=compute_${arch},code=[${code}]")
  endif()
endforeach()
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
list(JOIN archs " " CUDA_ARCHS)
string(STRIP "${CUDA_ARCHS} ${ptx}+ptx" CUDA_ARCHS)
set(CUDA_STATUS "built with nvcc ${CUDA_VERSION} for sm_${CUDA_ARCHS} (${CUDA_WHY})")
set(CUDA_OBJECTS $<TARGET_OBJECTS:kernels_cuda>)
set(CUDA_LIBRARIES ${CUDART_STATIC} Threads::Threads rt)
