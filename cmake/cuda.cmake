# Finds nvcc: $CUDACXX, PATH, /usr/local/cuda, or the wheels of  pip install "cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]".
# Sets ONEPASS_HAS_CUDA, ONEPASS_CUDA_LIBRARIES, ONEPASS_ARCHS (as the user sees them), and what compiles them:
# ONEPASS_CMAKE_ARCHS or ONEPASS_ARCH_FLAGS.
set(ONEPASS_HAS_CUDA OFF)
set(ONEPASS_ARCHS "")
set(ONEPASS_ARCH_FLAGS "")
set(ONEPASS_CUDA_LIBRARIES "")

if(NOT ONEPASS_CUDA STREQUAL "OFF")
  if(NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
    file(GLOB wheels "${Python_SITELIB}/nvidia/cu*/bin" "${Python_SITELIB}/nvidia/cuda_nvcc/bin")
    find_program(ONEPASS_NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin PATHS /usr/local/cuda/bin ${wheels})
    if(ONEPASS_NVCC)
      set(ENV{CUDACXX} ${ONEPASS_NVCC})
    endif()
  endif()
  # The wheels keep the libraries in lib/ where nvcc's own profile says lib64/.
  get_filename_component(nvcc_root "$ENV{CUDACXX}${CMAKE_CUDA_COMPILER}/../.." ABSOLUTE)
  if(NOT EXISTS ${nvcc_root}/lib64 AND EXISTS ${nvcc_root}/lib/libcudart_static.a)
    set(ONEPASS_CUDA_LIBRARIES ${nvcc_root}/lib)
    set(ENV{LIBRARY_PATH} "${nvcc_root}/lib:$ENV{LIBRARY_PATH}")
  endif()

  include(CheckLanguage)
  check_language(CUDA) # builds a scratch project: a broken nvcc, or a compiler it does not support, reads as "not found"
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.1)
      set(ONEPASS_HAS_CUDA ON)
    endif()
  endif()
  if(NOT ONEPASS_HAS_CUDA AND ONEPASS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ONEPASS_CUDA=ON, but no working nvcc >= 12.1 was found. Put nvcc on the PATH or set CUDACXX, "
                        "or build for the CPU alone with -C cmake.define.ONEPASS_CUDA=OFF.")
  endif()
endif()

if(ONEPASS_HAS_CUDA)
  set(ONEPASS_ARCHS ${ONEPASS_CUDA_ARCHS})
  if(NOT ONEPASS_ARCHS)
    set(ONEPASS_ARCHS "$ENV{ONEPASS_CUDA_ARCHS}")
  endif()
  string(REGEX REPLACE "[, ]+" ";" ONEPASS_ARCHS "${ONEPASS_ARCHS}")
  if(ONEPASS_ARCHS)
    set(ONEPASS_CMAKE_ARCHS "${ONEPASS_ARCHS}")
  else()
    # Machine code for 86 and 89 is that of 80, for 103 that of 100, for 121 that of 120. sm_110 and later GPUs compile
    # the PTX of 80. nvcc's front end runs once per PTX version, so the code for 90, 100 and 120 comes from the PTX of
    # 80, too: no kernel uses an instruction that only later versions have.
    set(ONEPASS_ARCHS 75-real 80 90-real)
    set(ptx_80 compute_80,sm_80,sm_90)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND ONEPASS_ARCHS 100-real 120-real)
      string(APPEND ptx_80 ,sm_100,sm_120)
    endif()
    set(ONEPASS_ARCH_FLAGS --generate-code=arch=compute_75,code=[sm_75] --generate-code=arch=compute_80,code=[${ptx_80}])
    set(ONEPASS_CMAKE_ARCHS OFF)
  endif()
endif()
