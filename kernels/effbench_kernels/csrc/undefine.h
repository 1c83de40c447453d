/* Ends what float32.h or bfloat16.h began. */
#undef T
#undef NAME
#undef LOAD
#undef STORE
#undef WIDE
#undef STORE4
#undef DOT_STEP
#undef DOT_VEC
#undef DOT_LOAD
#undef DOT
#undef A_TYPE
#undef PAIR
#undef LOAD_LINES
#undef BROADCAST
#undef STORE_LINE
