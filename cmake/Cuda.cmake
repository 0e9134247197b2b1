# The CUDA kernels: one set for each generation of loaders, compiled for the chips that it serves.
#
#   80  asynchronous copies by each thread; its code runs on every 8.x
#   90  the copy engine and barriers; 9.0, 10.x and 12.x, and PTX for what comes after
#
# ATTNRES_CUDA says whether, ATTNRES_CUDA_ARCHS which sets. Afterwards ATTNRES_CUDA_BUILT names the sets in the build, "80,90",
# or is empty.
set(ATTNRES_CUDA_SETS 80 90)
set(ATTNRES_CUDA_TARGETS_80 80-real)
set(ATTNRES_CUDA_TARGETS_90 90-real 100-real 120-real 90-virtual)
set(ATTNRES_CUDA_KERNELS depth_attention inter_block_attention)

set(ATTNRES_CUDA_BUILT "")
if(NOT ATTNRES_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "ATTNRES_CUDA is \"${ATTNRES_CUDA}\", expected ON, OFF or AUTO")
endif()
if(NOT ATTNRES_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  # Kernels name their targets themselves; a target without a list must not quietly be built for some default.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    find_package(CUDAToolkit REQUIRED)
    find_package(Cutlass)
    foreach(set IN LISTS ATTNRES_CUDA_ARCHS)
      if(NOT set IN_LIST ATTNRES_CUDA_SETS)
        list(JOIN ATTNRES_CUDA_SETS ", " sets)
        message(FATAL_ERROR "ATTNRES_CUDA_ARCHS names \"${set}\", expected some of ${sets}")
      endif()
    endforeach()
    list(JOIN ATTNRES_CUDA_ARCHS "," ATTNRES_CUDA_BUILT)
  elseif(ATTNRES_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ATTNRES_CUDA is ON, but there is no CUDA compiler: put nvcc on the PATH or set CUDACXX")
  endif()
endif()
if(ATTNRES_CUDA_BUILT)
  message(STATUS "CUDA kernels: sets ${ATTNRES_CUDA_BUILT}, nvcc ${CMAKE_CUDA_COMPILER_VERSION}, "
                 "CUTLASS headers ${Cutlass_INCLUDE_DIR} ${Cutlass_VERSION}")
else()
  message(STATUS "CUDA kernels: none")
endif()

# Adds the CUDA backend to the operator library, or what stands in for it.
function(attnres_add_cuda target)
  target_compile_definitions(${target} PRIVATE ATTNRES_CUDA_ARCHITECTURES="${ATTNRES_CUDA_BUILT}")
  if(NOT ATTNRES_CUDA_BUILT)
    target_sources(${target} PRIVATE csrc/ops/cuda_absent.cpp)
    return()
  endif()

  foreach(set IN LISTS ATTNRES_CUDA_ARCHS)
    set(library ${target}_sm${set})
    list(TRANSFORM ATTNRES_CUDA_KERNELS REPLACE "(.+)" "csrc/cuda/sm${set}/\\1.cu" OUTPUT_VARIABLE sources)
    add_library(${library} OBJECT ${sources})
    target_include_directories(${library} PRIVATE csrc/include csrc/cuda)
    # Compressed for size where every driver that the toolkit runs on can unpack that: those of CUDA 12 before 12.4 cannot.
    target_compile_options(${library} PRIVATE -lineinfo -Xcompiler=-Wall,-Wextra,-Werror=switch-enum
                                              $<$<VERSION_GREATER_EQUAL:$<CUDA_COMPILER_VERSION>,13.0>:--compress-mode=size>)
    set_target_properties(${library} PROPERTIES CUDA_ARCHITECTURES "${ATTNRES_CUDA_TARGETS_${set}}"
                                                CUDA_RUNTIME_LIBRARY Static)
    target_link_libraries(${target} PRIVATE ${library})
  endforeach()

  target_sources(${target} PRIVATE csrc/cuda/ops_cuda.cpp)
  target_include_directories(${target} PRIVATE csrc/cuda)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  # Torch brings a CUDA runtime of its own: ours must not answer in its place.
  target_link_options(${target} PRIVATE -Wl,--exclude-libs,libcudart_static.a)
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX CUDA_RUNTIME_LIBRARY Static)
endfunction()
