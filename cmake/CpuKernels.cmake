# The CPU kernels, compiled once for each instruction set; csrc/cpu/cpu_backend.cpp chooses one when it runs.
function(attnres_add_cpu_kernels target)
  function(add_kernels name)
    set(library ${target}_cpu_${name})
    string(SUBSTRING ${name} 0 1 initial)
    string(TOUPPER ${initial} initial)
    string(SUBSTRING ${name} 1 -1 rest)
    add_library(${library} OBJECT csrc/cpu/kernels.cpp)
    target_include_directories(${library} PRIVATE csrc/include)
    # Sums are reordered by hand, in the source, and nowhere else: no -ffast-math. GCC 12 warns of uninitialised values
    # inside its own AVX-512 headers.
    target_compile_options(${library} PRIVATE -O3 -ffp-contract=fast -fno-math-errno ${ARGN}
                                              "$<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>")
    target_compile_definitions(${library} PRIVATE ATTNRES_KERNELS=k${initial}${rest}Kernels
                                                  ATTNRES_KERNELS_NAME="${name}")
    target_link_libraries(${library} PRIVATE attnres_warnings)
    target_link_libraries(${target} PRIVATE ${library})
    set(library ${library} PARENT_SCOPE)
  endfunction()

  add_kernels(baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    set(x86_libraries ${library})
    add_kernels(avx2 -mavx2 -mfma -mf16c)
    list(APPEND x86_libraries ${library})
    add_kernels(avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c)
    list(APPEND x86_libraries ${library})
    foreach(library ${x86_libraries} ${target})
      target_compile_definitions(${library} PRIVATE ATTNRES_X86_KERNELS)
    endforeach()
  endif()
endfunction()
