# CUDA kernels for the target _C, if GSPN_CUDA selects them and nvcc is available.
set(GSPN_KNOWN_ARCHITECTURES 80 86 89 90 100 120)

if("${GSPN_CUDA}" STREQUAL "")  # not if(NOT ...): off is a false value too
  set(GSPN_CUDA auto)
endif()
string(TOLOWER "${GSPN_CUDA}" cuda_wanted)
if(NOT cuda_wanted MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "GSPN_CUDA must be auto, on or off, got ${GSPN_CUDA}")
endif()
if(cuda_wanted STREQUAL "off")
  message(STATUS "gspn-core: no CUDA kernels (GSPN_CUDA=off)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(cuda_wanted STREQUAL "on")
    message(FATAL_ERROR "GSPN_CUDA=on needs nvcc: put it on PATH, or name it in CUDACXX")
  endif()
  message(STATUS "gspn-core: no nvcc found, so only CPU kernels are built. For CUDA kernels put nvcc on PATH or name it "
                 "in CUDACXX, and install again.")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF)  # set below, once the compiler is known
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "gspn-core: the CUDA kernels need nvcc 12.4 or later, found ${CMAKE_CUDA_COMPILER_VERSION}; "
                      "GSPN_CUDA=off builds without them")
endif()

execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known_to_nvcc
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(architectures)
if(GSPN_CUDA_ARCHITECTURES)
  string(REGEX REPLACE "[ ,]+" ";" wanted_architectures "${GSPN_CUDA_ARCHITECTURES}")
  foreach(architecture IN LISTS wanted_architectures)
    if(NOT known_to_nvcc MATCHES "compute_${architecture}(\n|$)")
      message(FATAL_ERROR "GSPN_CUDA_ARCHITECTURES: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not know ${architecture}")
    endif()
    list(APPEND architectures ${architecture})
  endforeach()
else()
  foreach(architecture IN LISTS GSPN_KNOWN_ARCHITECTURES)
    if(known_to_nvcc MATCHES "compute_${architecture}(\n|$)")
      list(APPEND architectures ${architecture})
    endif()
  endforeach()
endif()
# Machine code for each, and PTX of the newest for later GPUs.
list(SORT architectures COMPARE NATURAL)
list(GET architectures -1 newest)
list(TRANSFORM architectures APPEND "-real" OUTPUT_VARIABLE targets)
list(APPEND targets "${newest}-virtual")
list(JOIN architectures " " architecture_names)
message(STATUS "gspn-core: CUDA kernels for ${architecture_names}, by nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

add_library(gspn_kernels_cuda OBJECT
  csrc/cuda/dispatch.cu
  csrc/cuda/kernels_bfloat16.cu
  csrc/cuda/kernels_float16.cu
  csrc/cuda/kernels_float32.cu
  csrc/cuda/kernels_float64.cu)
set_target_properties(gspn_kernels_cuda PROPERTIES
  CUDA_ARCHITECTURES "${targets}"
  CUDA_RUNTIME_LIBRARY Static  # the wheel needs no more than a driver
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  POSITION_INDEPENDENT_CODE ON
  CUDA_VISIBILITY_PRESET hidden)
target_include_directories(gspn_kernels_cuda PRIVATE csrc/include csrc/cuda)
target_compile_options(gspn_kernels_cuda PRIVATE -Xptxas=-v --Werror=all-warnings)
target_compile_definitions(_C PRIVATE GSPN_HAVE_CUDA
  GSPN_CUDA_COMPILER="nvcc ${CMAKE_CUDA_COMPILER_VERSION}" GSPN_CUDA_ARCHITECTURES="${architecture_names}")
set_target_properties(_C PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(_C PRIVATE gspn_kernels_cuda)
