# The LibTorch stable ABI of the torch that Python_EXECUTABLE imports: headers and the two libraries that are linked.
# find_package(Torch) is not used: it brings torch's own CUDA detection and compiler flags.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import torch, os; print(os.path.dirname(torch.__file__) + ';' + torch.__version__.split('+')[0], end='')"
  OUTPUT_VARIABLE _torch COMMAND_ERROR_IS_FATAL ANY)
list(GET _torch 0 TorchStable_DIR)
list(GET _torch 1 TorchStable_VERSION)
find_library(TorchStable_CPU_LIBRARY torch_cpu PATHS ${TorchStable_DIR}/lib NO_DEFAULT_PATH NO_CACHE)
find_library(TorchStable_LIBRARY torch PATHS ${TorchStable_DIR}/lib NO_DEFAULT_PATH NO_CACHE)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchStable
  REQUIRED_VARS TorchStable_CPU_LIBRARY TorchStable_LIBRARY
  VERSION_VAR TorchStable_VERSION)

if(TorchStable_FOUND AND NOT TARGET TorchStable::TorchStable)
  add_library(TorchStable::TorchStable SHARED IMPORTED)
  set_target_properties(
    TorchStable::TorchStable
    PROPERTIES IMPORTED_LOCATION ${TorchStable_CPU_LIBRARY}
               # libtorch must stay a needed library though no symbol of it is used here: where torch has CUDA it loads
               # libtorch_cuda, which the weak stream symbol is found in.
               INTERFACE_LINK_LIBRARIES "-Wl,--no-as-needed,${TorchStable_LIBRARY},--as-needed"
               # Oldest torch that the library runs under: 2.10.
               INTERFACE_COMPILE_DEFINITIONS TORCH_TARGET_VERSION=0x020a000000000000)
  target_include_directories(TorchStable::TorchStable SYSTEM INTERFACE ${TorchStable_DIR}/include)
endif()
