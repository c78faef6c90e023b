// Estimates whole passes, by estimate.h, and names what is chosen by it:
//
//   fused      a launch for each step, then the gradients
//   hybrid     the same steps, and cuDNN forms the gradients
//   pointwise  cuDNN convolves in each step, and forms the gradients
//
// The gradient of x counts from 5 channels on: a network's first layer needs none.
#pragma once

#include "passes.h"

namespace snnlstm::cuda {

constexpr int kFirstLayer = 4;  // the most channels of x whose gradient nobody wants

// Returns whether cuDNN may take Winograd's form of the forward convolution. Backward, d_gates are
// channels-last images, for which it has none.
inline bool may_be_winograd(const Cell& c) {
  return c.kernel_h == 3 && c.kernel_w == 3 && c.stride_h == 1 && c.stride_w == 1 &&
         c.dilation_h == 1 && c.dilation_w == 1;
}

// The seconds of cuDNN's convolutions of one step, by the products that it would multiply. Its
// tiles have whole blocks of outputs and of inputs: 64 and 32 on tensor cores, 32 and 8 on plain
// ones.
struct Cudnn {
  const Cell& c;
  Estimate e;
  Matrix matrix;
  bool tensor_cores;
  double pixels;

  Cudnn(const Cell& cell, const Device& device, Matrix numbers)
      : c(cell),
        e(device),
        matrix(numbers),
        tensor_cores(bytes_of(cell.dtype) == 2 ||
                     (numbers != Matrix::exact && numbers != Matrix::tf32x3)),
        pixels(double(cell.N) * double(cell.Ho() * cell.Wo())) {}

  double seconds(int64_t outputs, int64_t inputs, bool winograd) const {
    const double padded = double(round_up(outputs, tensor_cores ? 64 : 32)) *
                          double(round_up(inputs, tensor_cores ? 32 : 8));
    return padded * pixels / e.cudnn_rate(c.dtype, matrix, winograd);
  }
  int64_t taps() const { return int64_t(c.kernel_h) * c.kernel_w; }
  double forward() const {
    return double(taps()) * seconds(4 * c.C, c.Cin + c.C, may_be_winograd(c));
  }
  // The gradient of so many channels that were convolved.
  double data(int64_t channels) const { return double(taps()) * seconds(channels, 4 * c.C, false); }
  double weight(int64_t channels) const { return seconds(taps() * channels, 4 * c.C, false); }
};

// Returns the seconds of all steps, each in a launch of its own.
inline double fused_seconds(const Cell& c, const Device& device, Multiply multiply,
                            const Work& step) {
  const Estimate e(device);
  return double(c.T) * (e.seconds(step, multiply) + e.model.launch);
}

// Bytes of one time step.
struct StepBytes {
  double x, state;
  explicit StepBytes(const Cell& c)
      : x(double(c.N) * c.Cin * c.H * c.W * bytes_of(c.dtype)),
        state(double(c.N) * c.C * double(c.Ho() * c.Wo()) * bytes_of(c.dtype)) {}
};

// Returns the seconds of our kernels for the gradients of x, weight and bias over all steps.
inline double gradient_seconds(const Cell& c, const Device& device, const DataPlan& to_x,
                               const WeightPlans& weights) {
  const Estimate e(device);
  double seconds = 0;
  if (c.Cin > kFirstLayer)
    seconds += e.seconds(data_work(c, device, to_x, true), to_x.multiply) + e.model.launch;
  return seconds + e.seconds(weight_work(c, weights), weights.mem.multiply) + 4 * e.model.launch;
}

// Returns the seconds of cuDNN for the same. It reads d_gates once for each of them, and mem of all
// steps, which the kernels have written.
inline double gradient_seconds_of_cudnn(const Cell& c, const Device& device, Matrix matrix) {
  const Estimate e(device);
  const Cudnn cudnn(c, device, matrix);
  const StepBytes bytes(c);
  const bool of_x = c.Cin > kFirstLayer;
  const double multiplying =
      double(c.T) * (cudnn.weight(c.Cin) + cudnn.weight(c.C) + (of_x ? cudnn.data(c.Cin) : 0));
  const double moving =
      e.moving(c.T * ((of_x ? 12 : 8) * bytes.state + 2 * bytes.x + 4 * bytes.state));
  return std::max(multiplying, moving) + (of_x ? 8 : 7) * e.model.launch;
}

inline double forward_seconds(const Cell& c, const Device& device, const ForwardPass& pass) {
  const Estimate e(device);
  const Work step = forward_work(c, device, pass.step);
  const double firing = pass.step.fires ? 0 : e.model.launch + e.moving(StepBytes(c).state);
  return fused_seconds(c, device, pass.step.multiply, step) + c.T * firing;
}

inline double backward_seconds(const Cell& c, const Device& device, Matrix matrix,
                               const BackwardPass& pass) {
  const Estimate e(device);
  const Work step = data_work(c, device, pass.to_mem, false);
  const Multiply multiply = pass.to_mem.multiply;
  const double spreading = pass.spreads ? 0 : e.model.launch + e.moving(StepBytes(c).state);
  const double steps = fused_seconds(c, device, multiply, step);
  return steps + c.T * spreading +
         (pass.hybrid ? gradient_seconds_of_cudnn(c, device, matrix)
                      : gradient_seconds(c, device, pass.to_x, pass.weights));
}

// The convolution also writes and reads cat[x, mem] and the gate sums.
inline double pointwise_seconds(const Cell& c, const Device& device, Matrix matrix, bool backward) {
  const Estimate e(device);
  const Cudnn cudnn(c, device, matrix);
  const StepBytes bytes(c);
  const double operands = e.moving(backward ? 5 * bytes.state : 2 * bytes.x + 6 * bytes.state);
  const double multiplying = backward ? cudnn.data(c.C) : cudnn.forward();
  const double neurons = e.moving((backward ? 14 : 9) * bytes.state);
  const double gpu = std::max(multiplying, operands) + neurons + 3 * e.model.launch;
  const double step = std::max(gpu, e.model.host * (backward ? 1.5 : 1));
  return c.T * step + (backward ? gradient_seconds_of_cudnn(c, device, matrix) : 0);
}

}  // namespace snnlstm::cuda
