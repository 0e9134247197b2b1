# CUTLASS and CuTe headers, as the nvidia-cutlass wheel carries them. Sets Cutlass_INCLUDE_DIR and Cutlass_VERSION, and defines
# the target Cutlass::Headers. Nothing is downloaded.
if(NOT Cutlass_INCLUDE_DIR)
  execute_process(
    COMMAND
      ${Python_EXECUTABLE} -c
      "import importlib.util, os; s = importlib.util.find_spec('cutlass_library'); print(os.path.join(os.path.dirname(s.origin), 'source', 'include') if s else '', end='')"
    OUTPUT_VARIABLE _cutlass COMMAND_ERROR_IS_FATAL ANY)
  find_path(Cutlass_INCLUDE_DIR cute/tensor.hpp PATHS "${_cutlass}")
endif()
if(Cutlass_INCLUDE_DIR)
  file(STRINGS ${Cutlass_INCLUDE_DIR}/cutlass/version.h _lines REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH)")
  string(REGEX MATCHALL "[0-9]+" _numbers "${_lines}")
  string(REPLACE ";" "." Cutlass_VERSION "${_numbers}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Cutlass REQUIRED_VARS Cutlass_INCLUDE_DIR VERSION_VAR Cutlass_VERSION)
mark_as_advanced(Cutlass_INCLUDE_DIR)

if(Cutlass_FOUND AND NOT TARGET Cutlass::Headers)
  add_library(Cutlass::Headers INTERFACE IMPORTED)
  target_include_directories(Cutlass::Headers SYSTEM INTERFACE ${Cutlass_INCLUDE_DIR})
endif()
