// The CPU half's entry points, twins of csrc/cuda/api.h. All memory is the caller's: the sizes
// that it must bring are asked for first. Float32 and float64.
#pragma once

#include <string>
#include <vector>

#include "../args.h"

namespace snnlstm::cpu {

enum class Algorithm : int { automatic = 0, direct = 1, winograd = 2 };

// The cell without the taps that meet no pixel, which all the others here expect, and with the ways
// of its convolutions filled in (tiles, x_way). density: the part of x's
// values that are not zero; most_inputs: a side of the largest Winograd tile whose rounding errors
// the weights admit; backward: for the backward pass of a call.
Cell choose(const Cell& cell, Algorithm algorithm, double density, int most_inputs, bool backward);

// What choose() chose, such as "winograd4-sparse": the way of the recurrent half, then of x.
std::string way_name(const Cell& cell);

// Whether there are Winograd kernels for the cell's type and number of channels.
bool has_tiles(const Cell& cell);

// What the input half costs from lists of its nonzeros, as a part of what it costs directly.
double sparse_cost(const Cell& cell, double density);

// Bytes that a call needs as its workspace.
int64_t forward_workspace(const Cell& cell, int threads);
int64_t backward_workspace(const Cell& cell, int threads, bool weight);  // with its gradient?
int64_t weight_gradient_workspace(const Cell& cell, int threads);

// C rounded up to whole vectors: what a pixel of saved_syn holds, and a quarter of saved_gates.
int64_t padded_channels(const Cell& cell);

// The forms of a weight: ForwardArgs' and BackwardArgs' weight, weight_mem and weight_x.
enum class Form : int {
  forward = 0,
  forward_mem_tiles = 1,
  forward_x_tiles = 2,
  backward = 3,
  backward_mem_tiles = 4,
  backward_x_tiles = 5,
};

// Whether a call reads this form; grad_x: whether it is a backward pass that gives x a gradient.
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

// What the form depends on beside the channels and the instruction set, such as "3x3:4".
std::string form_name(const Cell& cell, Form form);

// weight: (4C, Cin + C, rows, columns), contiguous, the outer taps included.
int64_t packed_bytes(const Cell& cell, Form form);
void pack_weight(const Cell& cell, Form form, int threads, const void* weight, void* packed);

void forward(const ForwardArgs& args);
void backward(const BackwardArgs& args);
void weight_gradient(const WeightGradArgs& args);

// The instruction sets compiled in that this processor can run, best last, and the one in use:
// the best, or what the environment variable SNNLSTM_ISA names.
std::vector<std::string> isa_names();
std::string isa_name();
void set_isa(const std::string& name);  // std::invalid_argument where it cannot run

// What each instruction set's build provides.
struct Kernels {
  bool (*has_tiles)(const Cell&);
  double (*sparse_cost)(const Cell&, double density);
  int64_t (*forward_workspace)(const Cell&, int);
  int64_t (*backward_workspace)(const Cell&, int, bool);
  int64_t (*weight_gradient_workspace)(const Cell&, int);
  int64_t (*padded_channels)(const Cell&);
  int64_t (*packed_bytes)(const Cell&, Form);
  void (*pack_weight)(const Cell&, Form, int, const void*, void*);
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*weight_gradient)(const WeightGradArgs&);
};

}  // namespace snnlstm::cpu
