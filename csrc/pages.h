// Huge pages for memory that a call is about to write.
#pragma once

#include <cstddef>

namespace snnlstm {

// Asks for huge pages in memory that is about to be written for the first time. A page fault per
// 4 KiB costs a small layer as much as its arithmetic does. Without huge pages nothing is done.
void prefer_huge_pages(void* memory, size_t bytes);

}  // namespace snnlstm
