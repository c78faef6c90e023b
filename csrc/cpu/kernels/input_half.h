// The convolution of x in a forward pass, for a block of rows: directly, over lists of nonzeros, or
// by Winograd. The sums of one channel block lie in a strip of gates in L1.
#pragma once

#include "sparse.h"
#include "tiles.h"
#include "transpose.h"

SNNLSTM_BEGIN_ISA

// The rows of one image that a thread works on.
template <class T, int VL>
struct InputBlock {
  T* patch;                                        // input rows under the block, with border
  T* gates;                                        // (strip rows, Wr, 4, VL)
  typename SparseInput<T, VL>::InputLists* lists;  // of x's nonzeros, for every strip
};

// Sums x or mem directly for `rows` rows of each block, from row `first` on. The sums and the bias
// overwrite the block's gates; without a bias the sums are added to them. in(block) is the first
// row's input.
template <class T, int VL, class Block, class In>
void sweep(const Layout<T, VL>& l, const Input& half, const RunList& list, In&& in, int64_t first,
           int64_t rows, const T* weight, const T* bias, const Block* blocks, int64_t count) {
  constexpr int kGates = 4 * VL;
  list.chunks(chunk_length<T>(kGates), [&](const Run* chunk, int size) {
    for (int64_t h = 0; h < rows; ++h) {
      const Run* runs = chunk;
      int number = size;
      list.limit(runs, number, l.met(first + h, half));
      if (!bias && number == 0) continue;
      for (const Block* b = blocks; b < blocks + count; ++b) {
        T* out = b->gates + h * l.Wr * kGates;
        conv_row<Simd<T, VL>, 4>(
            in(*b) + h * half.stride_h * half.row(), half.stride_w * half.pixel, runs, number,
            weight, bias ? Start<T>{bias, 0} : Start<T>{out, kGates}, out, kGates, l.Wo);
      }
    }
    bias = nullptr;
  });
}

template <class T, int VL>
class InputHalf {
  using S = Simd<T, VL>;
  using GateVector = typename Merged<S, 4>::Vector;
  using Block = InputBlock<T, VL>;
  static constexpr int kGates = 4 * VL;

 public:
  InputHalf(const Layout<T, VL>& l, const View& x)
      : l_(l), c_(l.c), x_(x), block_(l.block_rows()), strip_(l.strip_rows()), sparse_(l, strip_) {
    if constexpr (kHasWinograd<T, VL>) {
      inputs_ = InputTransform<S>(l_.winograd);
      outputs_ =
          PlaneTransform<GateVector>::outputs(l_.winograd, l_.winograd.h.tile, l_.winograd.w.tile);
    }
  }

  void list_taps() { runs_ = l_.x.runs(c_, chunk_length<T>(kGates)); }
  const RunList& runs() const { return runs_; }
  const InputTransform<S>& inputs() const { return inputs_; }

  // A thread works on block() rows at a time, and strip() rows of them have their gates in L1.
  int64_t block() const { return block_; }
  int64_t strip() const { return strip_; }

  void allocate(Workspace& workspace, Block& b) const {
    const int64_t strips = lists() ? (block_ + strip_ - 1) / strip_ : 0;
    b.patch = workspace.take<T>(patch_rows(block_) * l_.x.row() + kReadAhead);
    b.gates = workspace.take<T>(strip_ * l_.Wr * kGates);
    b.lists = workspace.take<typename SparseInput<T, VL>::InputLists>(strips);
    for (int64_t strip = 0; strip < strips; ++strip) {
      typename SparseInput<T, VL>::InputLists lists;
      sparse_.allocate(workspace, lists);
      if (b.lists) b.lists[strip] = lists;
    }
  }

  // Reads what rows [b0, b1) of image n see at step t.
  void read(int64_t t, int64_t n, int64_t b0, int64_t b1, const Block& b) const {
    gather(t, n, b0, b1, b.patch);
    if (!lists()) return;
    for (int64_t h = b0; h < b1; h += strip_)
      sparse_.build(patch(b, h - b0), h + strip_ < b1 ? strip_ : b1 - h,
                    b.lists[(h - b0) / strip_]);
  }
  // Returns what the row `top` rows below the block's first row sees.
  const T* patch(const Block& b, int64_t top) const {
    return b.patch + top * c_.stride_h * l_.x.row();
  }

  // Adds the sums of x, directly or over lists, to the gates of a strip of each block: `rows` rows,
  // from `top` rows below the block's first row b0 on.
  template <class AnyBlock>
  void add(int64_t b0, int64_t top, int64_t rows, const T* weight, const AnyBlock* blocks,
           int64_t count) const {
    if (!lists())
      return sweep(
          l_, l_.x, runs_, [&](const Block& b) { return patch(b, top); }, b0 + top, rows, weight,
          static_cast<const T*>(nullptr), blocks, count);
    for (const AnyBlock* b = blocks; b < blocks + count; ++b)
      sparse_.convolve(b->lists[top / strip_], weight, c_.Cout > 0, b->gates);
  }

  // Describes the tiles of `rows` rows of each of `together` images, with memory for most_together.
  TileBlock<T> tiles(int64_t rows, int64_t together, int64_t most_together) const {
    return tile_block(l_, l_.winograd, rows, l_.x.blocks * VL, together, most_together);
  }
  void transform(const TileBlock<T>& tiles, const Block& b, T* values) const {
    inputs_.run(tiles, b.patch, l_.x.row(), c_.Cin, values);
  }

  // Writes the bias and the outputs of the tiles to the gates of rows [h0, h1) of one image. The
  // tiles begin at row b0.
  void assemble(const TileBlock<T>& b, int64_t image, int64_t b0, int64_t h0, int64_t h1,
                const T* bias, const T* products, T* gates) const {
    constexpr int lanes = GateVector::lanes;
    const Plane from{b.winograd.w.inputs() * b.products_stride, b.products_stride, lanes};
    const Plane to{b.dilation_h * l_.Wr * kGates, b.dilation_w * kGates, lanes};
    const int64_t r0 = image * b.rows + (h0 - b0) / l_.winograd.h.tile;
    const int64_t rows = l_.tiles(l_.winograd.h, c_.dilation_h, h1 - h0);
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t column = 0; column < b.columns; ++column) {
        T* out = gates + (b.row(k) * l_.Wr + b.column(column)) * kGates;
        outputs_.run(products + ((r0 + k) * b.columns + column) * kGates, from, out, to,
                     kGates / lanes, bias, Plane{0, 0, lanes});
      }
  }

 private:
  bool lists() const { return c_.x_algorithm == CpuAlgorithm::sparse; }

  // Returns how many input rows the kernel, or the tiles, of `rows` rows read.
  int64_t patch_rows(int64_t rows) const {
    if (!l_.tiled_x()) return (rows - 1) * c_.stride_h + (c_.kernel_h - 1) * c_.dilation_h + 1;
    return l_.whole(l_.winograd.h, c_.dilation_h, rows) +
           (l_.winograd.h.taps() - 1) * c_.dilation_h;
  }

  // Copies the input rows that rows [b0, b1) read, channels-last, with a zero border.
  void gather(int64_t t, int64_t n, int64_t b0, int64_t b1, T* patch) const {
    const int64_t first = b0 * c_.stride_h - l_.ph;
    const int64_t rows = patch_rows(b1 - b0);
    const int64_t row = l_.x.row();
    const int64_t border = l_.pw * c_.Cin;
    const int64_t right = (l_.pw + c_.W) * c_.Cin;
    const auto clamp = [](int64_t k, int64_t least, int64_t most) {
      return k < least ? least : k < most ? k : most;
    };
    const int64_t top = clamp(-first, 0, rows);
    const int64_t bottom = clamp(c_.H - first, top, rows);
    std::memset(patch, 0, top * row * sizeof(T));
    std::memset(patch + bottom * row, 0, (rows - bottom) * row * sizeof(T));
    for (int64_t k = top; k < bottom; ++k) {
      std::memset(patch + k * row, 0, border * sizeof(T));
      std::memset(patch + k * row + right, 0, (row - right) * sizeof(T));
    }
    load_rows<S>(x_, t, n, first + top, bottom - top, c_.Cin, patch + top * row + border,
                 Pixels{c_.W, row, c_.Cin}, c_.Cin);
  }

  const Layout<T, VL>& l_;
  const Cell& c_;
  const View& x_;
  int64_t block_, strip_;
  SparseInput<T, VL> sparse_;
  InputTransform<S> inputs_;
  PlaneTransform<GateVector> outputs_;
  RunList runs_;
};

SNNLSTM_END_ISA
