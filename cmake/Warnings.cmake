# Warnings are errors in our own host code. ATTNRES_WERROR=OFF is for compilers newer than those we test with.
option(ATTNRES_WERROR "Treat warnings in host code as errors" ON)
add_library(attnres_warnings INTERFACE)
target_compile_options(
  attnres_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
                             $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${ATTNRES_WERROR}>>:-Werror>)
