# Warnings of our own host code. CMAKE_COMPILE_WARNING_AS_ERROR makes errors of them, and of nvcc's, as our CI does: other
# people's compilers warn of what ours do not. A switch that does not name every value of an enumeration is an error always:
# what it forgot must not pass for something else.
add_library(attnres_warnings INTERFACE)
target_compile_options(attnres_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror=switch-enum>)
