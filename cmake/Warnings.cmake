# Warnings of our own host code. CMAKE_COMPILE_WARNING_AS_ERROR makes errors of them, and of nvcc's, as our CI does: other
# people's compilers warn of what ours do not.
add_library(attnres_warnings INTERFACE)
target_compile_options(attnres_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
