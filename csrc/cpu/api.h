// The CPU half's entry points, twins of csrc/cuda/api.h, in float32 and float64. All memory is the
// caller's, who asks for its sizes first.
#pragma once

#include <string>
#include <vector>

#include "../args.h"

namespace snnlstm::cpu {

enum class Algorithm : int { automatic = 0, direct = 1, winograd = 2 };

// Returns the cell without the taps that meet no pixel, which all other functions here expect, and
// with the ways of its convolutions (tiles, x_way). density is the part of x's values that are not
// zero, most_inputs a side of the largest Winograd tile whose rounding errors the weights admit,
// and backward says whether the cell is for the backward pass of a call.
Cell choose(const Cell& cell, Algorithm algorithm, double density, int most_inputs, bool backward);

// Returns what choose() chose, such as "winograd4-sparse": the recurrent half's way, then x's.
std::string way_name(const Cell& cell);

// The forms of a weight. The first three are ForwardArgs' weight, weight_mem and weight_x, the
// others are BackwardArgs'.
enum class Form : int {
  forward = 0,
  forward_mem_tiles = 1,
  forward_x_tiles = 2,
  backward = 3,
  backward_mem_tiles = 4,
  backward_x_tiles = 5,
};

// Says whether a call reads this form. grad_x says whether the call is a backward pass that gives x
// a gradient.
inline bool reads(const Cell& c, Form form, bool grad_x) {
  const bool tiles = c.tiled(), tiles_of_x = tiles && c.stride_h == 1 && c.stride_w == 1;
  switch (form) {
    case Form::forward:
      return !tiles || c.x_way != Way::winograd;
    case Form::forward_x_tiles:
      return c.x_way == Way::winograd;
    case Form::backward:
      return !tiles || (grad_x && !tiles_of_x);
    case Form::backward_x_tiles:
      return tiles_of_x && grad_x;
    default:
      return tiles;
  }
}

// Returns what the form depends on beside the channels and the instruction set, such as "3x3:4".
std::string form_name(const Cell& cell, Form form);

// What each instruction set's build provides.
struct Kernels {
  // Says whether there are Winograd kernels for the cell's type and number of channels.
  bool (*has_tiles)(const Cell&);
  // Returns the cost of the input half from lists of its nonzeros, over its cost in direct sums, or
  // infinity if the image is too large for lists.
  double (*sparse_cost)(const Cell&, double density);

  // These return the bytes that a call needs as its workspace. `weight` says whether the backward
  // pass forms the weight's gradient.
  int64_t (*forward_workspace)(const Cell&, int threads);
  int64_t (*backward_workspace)(const Cell&, int threads, bool weight);

  // Returns C rounded up to whole vectors. A pixel of saved_syn has so many values, a pixel of
  // saved_gates four times as many, or twice as many with half_gates.
  int64_t (*padded_channels)(const Cell&);

  // The weight is (4C, Cin + C, rows, columns), contiguous, and includes the outer taps.
  int64_t (*packed_bytes)(const Cell&, Form);
  void (*pack_weight)(const Cell&, Form, int threads, const void* weight, void* packed);

  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
};

// Returns the kernels of the instruction set in use, for the cell's number of channels.
const Kernels& kernels(const Cell& cell);

// isa_names() lists the compiled instruction sets that this processor can run, best last.
// isa_name() is the one in use: the best, or what the environment variable SNNLSTM_ISA names.
std::vector<std::string> isa_names();
std::string isa_name();
void set_isa(const std::string& name);  // std::invalid_argument where it cannot run

}  // namespace snnlstm::cpu
