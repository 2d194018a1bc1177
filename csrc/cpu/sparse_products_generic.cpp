// Kernels for any machine: the compiler's default instruction set.
#include <cstring>
#include <vector>

#include "parallel.h"
#include "sparse_products.h"

#define SPARSEKERN_ISA generic
#include "sparse_products.inl"
