// Which OpenMP runtime this module uses: the one that torch has loaded, whatever its name is.
#pragma once

namespace snnlstm {

// Path of the runtime in use, such as ".../torch/lib/libgomp.so.1"; "" where there is none and
// every parallel region runs on the calling thread alone. Looked up at the first call, after which
// it stays: import torch before.
const char* openmp_library();

}  // namespace snnlstm
