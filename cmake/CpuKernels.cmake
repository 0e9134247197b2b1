# The CPU kernels, compiled once for each instruction set; csrc/cpu/instruction_sets.cpp chooses one when it runs.
#
# ATTNRES_CPU_SETS says which: "all" that the compiler knows, or "native" for the one that the processor of this machine would
# choose, in a third of the time and for such machines alone.
set(ATTNRES_CPU_SETS all CACHE STRING "Which sets of CPU kernels to build: all, or native for this machine's alone")
if(NOT ATTNRES_CPU_SETS MATCHES "^(all|native)$")
  message(FATAL_ERROR "ATTNRES_CPU_SETS is \"${ATTNRES_CPU_SETS}\", expected all or native")
endif()

# From what every processor has to the widest. A set's flags, and the macros by which a compiler says that it has all of them.
set(ATTNRES_CPU_KERNELS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(APPEND ATTNRES_CPU_KERNELS avx2 avx512)
  set(ATTNRES_CPU_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(ATTNRES_CPU_MACROS_avx2 __AVX2__ __FMA__ __F16C__)
  set(ATTNRES_CPU_FLAGS_avx512 ${ATTNRES_CPU_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16)
  set(ATTNRES_CPU_MACROS_avx512 __AVX512F__ __AVX512BW__ __AVX512VL__ __AVX512DQ__ __AVX512BF16__)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  # Armv8.6 has made bfloat16 a part of every processor; Neoverse V1 (8.4) has it, too.
  list(APPEND ATTNRES_CPU_KERNELS armv86)
  set(ATTNRES_CPU_FLAGS_armv86 -march=armv8.2-a+bf16)
  set(ATTNRES_CPU_MACROS_armv86 __ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
endif()

# The widest set that the compiler itself would choose for this processor.
function(attnres_native_cpu_kernels result)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -march=native -dM -E -x c++ /dev/null
                  OUTPUT_VARIABLE macros COMMAND_ERROR_IS_FATAL ANY)
  foreach(name IN LISTS ATTNRES_CPU_KERNELS)
    set(has_all TRUE)
    foreach(macro IN LISTS ATTNRES_CPU_MACROS_${name})
      if(NOT macros MATCHES "#define ${macro} 1")
        set(has_all FALSE)
      endif()
    endforeach()
    if(has_all)
      set(${result} ${name} PARENT_SCOPE)
    endif()
  endforeach()
endfunction()

function(attnres_add_cpu_kernels target)
  if(ATTNRES_CPU_SETS STREQUAL "native")
    attnres_native_cpu_kernels(ATTNRES_CPU_KERNELS)
  endif()
  foreach(name IN LISTS ATTNRES_CPU_KERNELS)
    set(library ${target}_cpu_${name})
    add_library(${library} OBJECT csrc/cpu/kernels.cpp)
    target_include_directories(${library} PRIVATE csrc/include)
    # Sums are reordered by hand, in the source, and nowhere else: no -ffast-math. GCC 12 warns of uninitialised values
    # inside its own AVX-512 headers.
    target_compile_options(${library} PRIVATE -O3 -ffp-contract=fast -fno-math-errno ${ATTNRES_CPU_FLAGS_${name}}
                                              "$<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>")
    target_compile_definitions(${library} PRIVATE ATTNRES_KERNELS=${name}_kernels ATTNRES_KERNELS_NAME="${name}")
    target_link_libraries(${library} PRIVATE attnres_warnings)
    target_link_libraries(${target} PRIVATE ${library})
    string(TOUPPER ${name} upper)
    target_compile_definitions(${target} PRIVATE ATTNRES_HAS_${upper}_KERNELS)
  endforeach()
  target_sources(${target} PRIVATE csrc/cpu/instruction_sets.cpp)
  message(STATUS "CPU kernels: ${ATTNRES_CPU_KERNELS}")
endfunction()
