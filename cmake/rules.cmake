# onepass_generate(): from ONEPASS_RULES, ONEPASS_PASSES and ONEPASS_ISAS
#   - one translation unit per rule for the CPU (compiled once per instruction set) and one for CUDA
#   - onepass_rules.hpp, the X-macros that the binding expands
# in the folder ONEPASS_GENERATED. Sets ONEPASS_CPU_SOURCES, ONEPASS_CUDA_SOURCES and, of these, ONEPASS_SAME_BITS_SOURCES.
function(onepass_generate)
  set(out ${CMAKE_CURRENT_BINARY_DIR}/generated)
  set(includes "")
  set(each_rule "")
  set(cpu_sources "")
  set(cuda_sources "")
  foreach(rule IN LISTS ONEPASS_RULES ONEPASS_PASSES)
    if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/rules/${rule}.hpp)
      message(FATAL_ERROR "rule '${rule}' is listed, but there is no csrc/rules/${rule}.hpp")
    endif()
    string(APPEND includes "#include \"rules/${rule}.hpp\"\n")
    string(APPEND each_rule " X(${rule})")
    configure_file(${CMAKE_CURRENT_SOURCE_DIR}/cmake/apply.cpp.in ${out}/${rule}.cpp @ONLY)
    configure_file(${CMAKE_CURRENT_SOURCE_DIR}/cmake/apply.cu.in ${out}/${rule}.cu @ONLY)
    list(APPEND cpu_sources ${out}/${rule}.cpp)
    list(APPEND cuda_sources ${out}/${rule}.cu)
  endforeach()
  set(each_isa "")
  set(each_isa_of "")
  foreach(isa IN LISTS ONEPASS_ISAS)
    string(APPEND each_isa " X(${isa})")
    string(APPEND each_isa_of " X(${isa}, rule)")
  endforeach()
  file(CONFIGURE OUTPUT ${out}/onepass_rules.hpp @ONLY CONTENT
"// Generated from the lists in CMakeLists.txt.
#pragma once
@includes@
#define ONEPASS_RULES(X)@each_rule@
#define ONEPASS_ISAS(X)@each_isa@
#define ONEPASS_ISAS_OF(X, rule)@each_isa_of@
")
  set(ONEPASS_GENERATED ${out} PARENT_SCOPE)
  set(ONEPASS_SAME_BITS_SOURCES ${cuda_sources} ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/reduce.cu PARENT_SCOPE)
  set(ONEPASS_CPU_SOURCES ${cpu_sources} ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/reduce.cpp PARENT_SCOPE)
  foreach(source device reduce dropout row_norm row_norm_backward batch_norm batch_norm_backward)
    list(APPEND cuda_sources ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/${source}.cu)
  endforeach()
  set(ONEPASS_CUDA_SOURCES ${cuda_sources} ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/engine.cpp PARENT_SCOPE)
endfunction()
