# Builds the extension with its CUDA kernels compiled by g++ and run on the CPU. Needs CUDA's headers, not its compiler.
# ONEPASS_SANITIZE lists additional builds with sanitizers: "address,undefined;thread" makes address/_C*.so and
# thread/_C*.so beside _C*.so. They share the CPU kernels' objects, which are not instrumented.
set(CUDA_INCLUDE_HINTS $ENV{CUDA_HOME}/include /usr/local/cuda/include)
file(GLOB wheels "${Python_SITELIB}/nvidia/cu*/include")
find_path(ONEPASS_CUDA_INCLUDE cuda_bf16.h HINTS ${CUDA_INCLUDE_HINTS} ${wheels} REQUIRED)

set(host_sources ${ONEPASS_CUDA_SOURCES} ${CMAKE_CURRENT_LIST_DIR}/counters.cpp)
set_source_files_properties(${host_sources} PROPERTIES LANGUAGE CXX)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64") # the layers with fused multiply-adds, as nvcc compiles them
  set(layer_sources ${ONEPASS_CUDA_SOURCES})
  list(REMOVE_ITEM layer_sources ${ONEPASS_SAME_BITS_SOURCES})
  set_source_files_properties(${layer_sources} PROPERTIES COMPILE_OPTIONS "-mfma;-ffp-contract=fast")
endif()
set(host_definitions ONEPASS_HAS_CUDA ONEPASS_CUDA_ON_HOST "ONEPASS_CUDA_ARCHS_BUILT=\"host\"")

# Adds the kernels as library `kernels` and links them into the extension `module`.
function(add_host_kernels kernels module)
  add_library(${kernels} OBJECT ${host_sources})
  target_include_directories(${kernels} PRIVATE csrc tests/cuda_on_host ${ONEPASS_GENERATED})
  target_include_directories(${kernels} SYSTEM PRIVATE ${ONEPASS_CUDA_INCLUDE})
  # -g1: line numbers for the sanitizers' reports. -fno-strict-aliasing: kernels see memory as 16-byte words.
  target_compile_options(${kernels} PRIVATE -x c++ -O1 -g1 -ffp-contract=off -fno-strict-aliasing
                         -fno-omit-frame-pointer ${warnings})
  target_compile_definitions(${kernels} PRIVATE ONEPASS_CUDA_ON_HOST)
  target_link_libraries(${module} PRIVATE ${kernels})
  target_compile_definitions(${module} PRIVATE ${host_definitions})
endfunction()

# The extension again, with sanitizers for the kernels and, for AddressSanitizer, the binding's files that handle memory.
# The binding's other objects are reused uninstrumented, because they are slow to compile.
function(add_sanitized_module sanitizers)
  string(REGEX REPLACE ",.*" "" name ${sanitizers})
  set(checked "")
  set(objects $<TARGET_OBJECTS:_C>)
  if(name STREQUAL "address")
    get_target_property(checked _C SOURCES)
    list(FILTER checked INCLUDE REGEX "bind/[a-z]+\\.cpp$")
    set(objects $<FILTER:${objects},EXCLUDE,bind/[a-z]+\\.cpp>)
  endif()
  pybind11_add_module(_C_${name} MODULE NO_EXTRAS ${checked} ${objects})
  set_target_properties(_C_${name} PROPERTIES LINKER_LANGUAGE CXX LIBRARY_OUTPUT_NAME _C
                        LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/${name})
  foreach(property INCLUDE_DIRECTORIES COMPILE_DEFINITIONS COMPILE_OPTIONS LINK_LIBRARIES)
    get_target_property(value _C ${property})
    set_property(TARGET _C_${name} APPEND PROPERTY ${property} ${value})
  endforeach()
  add_host_kernels(cuda_kernels_${name} _C_${name})
  target_compile_options(cuda_kernels_${name} PRIVATE -fsanitize=${sanitizers} -fno-sanitize-recover=all)
  target_compile_options(_C_${name} PRIVATE -fsanitize=${name} -g1 -O1)
  target_link_options(_C_${name} PRIVATE -fsanitize=${sanitizers})
endfunction()

foreach(sanitizers IN LISTS ONEPASS_SANITIZE)
  add_sanitized_module(${sanitizers})  # before _C has plain kernels to pass on
endforeach()
add_host_kernels(cuda_kernels _C)

# For machine_model.py, built on demand: which kernels a call launches. -no-pie: addresses are those of the symbol table.
add_executable(launch_shapes EXCLUDE_FROM_ALL ${CMAKE_CURRENT_LIST_DIR}/launch_shapes.cpp)
target_include_directories(launch_shapes PRIVATE csrc tests/cuda_on_host)
target_include_directories(launch_shapes SYSTEM PRIVATE ${ONEPASS_CUDA_INCLUDE})
target_compile_definitions(launch_shapes PRIVATE ONEPASS_CUDA_ON_HOST)
target_compile_options(launch_shapes PRIVATE ${warnings})
target_link_options(launch_shapes PRIVATE -no-pie)
target_link_libraries(launch_shapes PRIVATE cuda_kernels)
