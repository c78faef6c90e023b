# Decides whether the CUDA backend is built. Sets NVCC (the compiler's path or ""), NVCC_ARCHS (the
# compute capabilities) and CUDA_WHY (the reason in words). SNNLSTM_CUDA and SNNLSTM_CUDA_ARCHS are
# variables of CMake or of the environment, the others only of the environment.
set(OLDEST_NVCC 11.8) # the first with cudaLaunchKernelExC and __grid_constant__
set(OLDEST_ARCH 75)
set(ALL_ARCHS 75 80 86 89 90 100 120)

foreach(name SNNLSTM_CUDA SNNLSTM_CUDA_ARCHS)
  if(NOT DEFINED ${name})
    set(${name} "$ENV{${name}}")
  endif()
endforeach()
string(TOLOWER "${SNNLSTM_CUDA}" wish)
if(NOT wish MATCHES "^(on|off|pip|failed|)$") # tools/backend.py sets it to failed
  message(FATAL_ERROR "SNNLSTM_CUDA is '${SNNLSTM_CUDA}'; accepted: on, off, pip, or unset (automatic)")
endif()
set(tag "$ENV{SNNLSTM_LOCAL_VERSION}") # such as cu13, the CUDA that a wheel is named after

# ---- the compiler: the first usable one ----------------------------------------------------------
set(CUDA_WHY "no CUDA compiler found")
set(candidates "")
execute_process(COMMAND "${Python_EXECUTABLE}" -c "import nvidia; print(*nvidia.__path__, sep=';')"
                OUTPUT_VARIABLE sites ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
foreach(site IN LISTS sites)
  file(GLOB packages "${site}/cu*/bin/nvcc") # of the pip package nvidia-cuda-nvcc
  list(APPEND candidates ${packages})
endforeach()
if(wish STREQUAL "off" OR tag STREQUAL "cpu")
  set(CUDA_WHY "it is switched off by SNNLSTM_CUDA or by a wheel named +cpu")
  set(candidates "")
elseif(wish STREQUAL "failed")
  set(CUDA_WHY "building them failed; SNNLSTM_CUDA=on shows why")
  set(candidates "")
elseif(NOT CMAKE_HOST_SYSTEM_NAME STREQUAL "Linux")
  set(CUDA_WHY "it is built only on Linux")
  set(candidates "")
elseif(CMAKE_CUDA_COMPILER)
  set(candidates "${CMAKE_CUDA_COMPILER}")
elseif(NOT wish STREQUAL "pip" AND NOT "$ENV{CUDACXX}" STREQUAL "")
  find_program(named "$ENV{CUDACXX}" NO_CACHE)
  set(candidates "${named}") # only this one: another would be a surprise
elseif(NOT wish STREQUAL "pip")
  string(REPLACE ":" "/nvcc;" path "$ENV{PATH}/nvcc")
  list(PREPEND candidates "$ENV{CUDA_HOME}/bin/nvcc" "$ENV{CUDA_PATH}/bin/nvcc" ${path})
  list(APPEND candidates "/usr/local/cuda/bin/nvcc")
endif()

set(NVCC "")
foreach(nvcc IN LISTS candidates)
  if(NOT EXISTS "${nvcc}")
    continue()
  endif()
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_VARIABLE text)
  string(REGEX MATCH "release (([0-9]+)[.][0-9]+)" found "${text}")
  set(release "${CMAKE_MATCH_1}")
  set(major "${CMAKE_MATCH_2}")
  if(NOT found)
    string(REGEX REPLACE "[^ -~]+|[\"\\]" " " text "${text}") # build_info.h quotes it
    string(APPEND CUDA_WHY "; ${nvcc} --version says: ${text}")
  elseif(release VERSION_LESS OLDEST_NVCC)
    string(APPEND CUDA_WHY "; ${nvcc} is of CUDA ${release}, and the kernels need ${OLDEST_NVCC} or newer")
  elseif(tag MATCHES "^cu[0-9]" AND NOT tag STREQUAL "cu${major}")
    string(APPEND CUDA_WHY "; ${nvcc} is of CUDA ${release}, but the wheel's name is ${tag}")
  else()
    set(NVCC "${nvcc}")
    set(CUDA_WHY "${nvcc}")
    break()
  endif()
endforeach()

# ---- for which GPUs ------------------------------------------------------------------------------
# All GPUs take minutes, so a plain `pip install .` builds only for those of this machine.
set(NVCC_ARCHS "${SNNLSTM_CUDA_ARCHS}")
if(NVCC_ARCHS STREQUAL "" AND wish)
  set(NVCC_ARCHS ${ALL_ARCHS})
elseif(NVCC AND NVCC_ARCHS MATCHES "^(native|)$")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE text ERROR_QUIET)
  set(NVCC_ARCHS "")
  string(REGEX MATCHALL "[0-9]+[.][0-9]" gpus "${text}")
  foreach(gpu IN LISTS gpus)
    string(REPLACE "." "" arch "${gpu}")
    if(NOT arch LESS OLDEST_ARCH)
      list(APPEND NVCC_ARCHS ${arch})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES NVCC_ARCHS)
  if(NVCC_ARCHS STREQUAL "")
    set(CUDA_WHY "nvidia-smi shows no GPU of 7.5 or newer; SNNLSTM_CUDA=on builds it for all, with ${NVCC}")
    set(NVCC "")
  endif()
endif()

if(NOT NVCC AND (wish MATCHES "on|pip" OR tag MATCHES "^cu[0-9]" OR SNNLSTM_CUDA_ARCHS STREQUAL "native"))
  message(FATAL_ERROR
    "SNNLSTM_CUDA=${wish}, but ${CUDA_WHY}.\nSet CUDACXX=/path/to/nvcc, or SNNLSTM_CUDA=pip to have pip "
    "fetch CUDA 13's compiler for the build (not with --no-build-isolation), or SNNLSTM_CUDA=off.")
endif()
