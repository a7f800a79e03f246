/* See kernels.inc; setup.py gives the flags. */
#include "kernels.inc"
