// Kernels for any machine: the compiler's default instruction set.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "bits.h"
#include "csr_encode.h"
#include "isa.h"
#include "parallel.h"
#include "row_adam.h"
#include "screening.h"
#include "sparse_products.h"
#include "topk_encode.h"
#include "workspace.h"

#define SPARSEKERN_ISA generic
#define SPARSEKERN_LEVEL 0
#include "sparse_products.inl"
#include "screening.inl"
#include "topk_encode.inl"
#include "csr_encode.inl"
#include "row_adam.inl"
#include "bits.inl"
