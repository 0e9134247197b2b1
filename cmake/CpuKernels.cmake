# The CPU kernels, compiled once for each instruction set; csrc/cpu/cpu_backend.cpp chooses one when it runs.
#
# ATTNRES_CPU_SETS says which: "all", or "native" for the one that the processor of this machine would choose, in a third of the
# time and for this machine alone.
set(ATTNRES_CPU_SETS all CACHE STRING "Which sets of CPU kernels to build: all, or native for this machine's alone")
if(NOT ATTNRES_CPU_SETS MATCHES "^(all|native)$")
  message(FATAL_ERROR "ATTNRES_CPU_SETS is \"${ATTNRES_CPU_SETS}\", expected all or native")
endif()
set(ATTNRES_CPU_FLAGS_baseline "")
set(ATTNRES_CPU_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(ATTNRES_CPU_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c)

# The widest set all of whose flags the compiler itself would choose for this processor.
function(attnres_native_cpu_set result)
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -march=native -dM -E -x c++ /dev/null
                  OUTPUT_VARIABLE macros COMMAND_ERROR_IS_FATAL ANY)
  foreach(name baseline avx2 avx512)
    set(has_all TRUE)
    foreach(flag IN LISTS ATTNRES_CPU_FLAGS_${name})
      string(REGEX REPLACE "^-m" "" feature ${flag})
      string(TOUPPER ${feature} feature)
      if(NOT macros MATCHES "#define __${feature}__ 1")
        set(has_all FALSE)
      endif()
    endforeach()
    if(has_all)
      set(${result} ${name} PARENT_SCOPE)
    endif()
  endforeach()
endfunction()

function(attnres_add_cpu_kernels target)
  # Fills the table of that name with the kernels of a set.
  function(add_kernels name table)
    set(library ${target}_cpu_${name})
    add_library(${library} OBJECT csrc/cpu/kernels.cpp)
    target_include_directories(${library} PRIVATE csrc/include)
    # Sums are reordered by hand, in the source, and nowhere else: no -ffast-math. GCC 12 warns of uninitialised values
    # inside its own AVX-512 headers.
    target_compile_options(${library} PRIVATE -O3 -ffp-contract=fast -fno-math-errno ${ATTNRES_CPU_FLAGS_${name}}
                                              "$<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>")
    target_compile_definitions(${library} PRIVATE ATTNRES_KERNELS=${table} ATTNRES_KERNELS_NAME="${name}")
    target_link_libraries(${library} PRIVATE attnres_warnings)
    target_link_libraries(${target} PRIVATE ${library})
  endfunction()

  set(name baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    if(ATTNRES_CPU_SETS STREQUAL "native")
      attnres_native_cpu_set(name)
    else()
      add_kernels(avx2 kAvx2Kernels)
      add_kernels(avx512 kAvx512Kernels)
      foreach(library ${target}_cpu_avx2 ${target}_cpu_avx512 ${target})
        target_compile_definitions(${library} PRIVATE ATTNRES_X86_KERNELS)
      endforeach()
    endif()
  endif()
  # Alone, the native set stands where what every processor can run does.
  add_kernels(${name} kBaselineKernels)
  message(STATUS "CPU kernels: ${ATTNRES_CPU_SETS} (${name})")
endfunction()
