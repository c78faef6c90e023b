// The data gradient of a convolution. With stride 1 it is a convolution of the gates' gradient with
// the flipped kernel. With a stride, the output pixels of each remainder modulo the stride see
// their own subset of the taps. With Winograd the recurrent and the input half share the
// transformed gates' gradient of a block of tiles.
#pragma once

#include "tiles.h"

SNNLSTM_BEGIN_ISA

template <class T, int VL>
class DataGrad {
  using S = Simd<T, VL>;
  using Two =
      typename Merged<S, 2>::Vector;  // holds two neighbours, if the processor's vectors are longer

 public:
  // The gradient has `vectors` vectors of channels and `width` columns, and belongs to the input of
  // a convolution of the given stride.
  DataGrad(const Layout<T, VL>& l, int64_t vectors, int64_t width, int stride_h, int stride_w)
      : l_(l),
        vectors_(vectors),
        width_(width),
        sh_(stride_h),
        sw_(stride_w),
        lists_(new RunList[int64_t(stride_h) * stride_w]) {
    if constexpr (kHasWinograd<T, VL>) {
      outputs_ = PlaneTransform<S>::outputs(l.winograd, l.winograd.h.tile, l.winograd.w.tile);
      outputs_of_two_ =
          PlaneTransform<Two>::outputs(l.winograd, l.winograd.h.tile, l.winograd.w.tile);
    }
    const int64_t pixel = 4 * l.Cp;
    const int64_t row = l.gate_row();
    const int64_t max_len = chunk();
    const bool few = l.few_channels();  // the sums then leave out lanes without a channel
    if (sh_ == 1 && sw_ == 1 && !few) {
      lists_[0].dense(l.c, pixel, row, pixel, 0, max_len);
      return;
    }
    for (int a = 0; a < sh_; ++a)
      for (int b = 0; b < sw_; ++b) {
        RunList& list = lists_[a * sw_ + b];
        list.reserve(l.taps * (few ? 4 : pixel / max_len + 1));
        for (int64_t i = 0; i < l.c.kernel_h; ++i)
          for (int64_t j = 0; j < l.c.kernel_w; ++j) {
            const int64_t h = a + l.ph - i * l.c.dilation_h, w = b + l.pw - j * l.c.dilation_w;
            if (h % sh_ != 0 || w % sw_ != 0) continue;
            const int64_t tap = l.taps - 1 - (i * l.c.kernel_w + j);
            const int64_t in = (h / sh_ + l.ph) * row + (w / sw_ + l.pw) * pixel;
            if (!few) list.add({in, tap * pixel, pixel}, max_len);
            for (int64_t gate = 0; few && gate < 4; ++gate)
              list.add({in + gate * VL, tap * pixel + gate * VL, l.c.C}, max_len);
          }
      }
  }

  int64_t row_size() const { return width_ * vectors_ * VL; }

  // Writes rows [begin, end) of some images to out, channels-last. d_gates(k) is image k's, with
  // its border.
  template <class In>
  void rows(int64_t images, In&& d_gates, const T* weight, int64_t begin, int64_t end,
            T* out) const {
    each_block([&](int64_t block, auto vectors) {
      sweep<decltype(vectors)::value>(images, d_gates, weight, block, begin, end, out);
    });
  }

  // Does the same by Winograd, for the rows of a block of tiles. `values` are the block's
  // transformed d gates, the weight is (blocks of vectors, points, parts, 4 Cp, NV * VL).
  void tiles(const TileBlock<T>& b, const T* values, const T* weight, T* products, int64_t begin,
             int64_t end, T* out) const {
    each_block([&](int64_t block, auto vectors) {
      tile_sweep<decltype(vectors)::value>(b, values, weight, products, block, end - begin, out);
    });
  }

 private:
  // Calls f(first vector, number of vectors) for every block that a register tile takes.
  template <class F>
  void each_block(F&& f) const {
    for (int64_t block = 0; block < vectors_;) {
      const int count = vector_block(vectors_, block, VL * int(sizeof(T))).count;
      with_count<4>(count, [&](auto vectors) { f(block, vectors); });
      block += count;
    }
  }

  template <int NV>
  void tile_sweep(const TileBlock<T>& b, const T* values, const T* weight, T* products,
                  int64_t block, int64_t rows, T* out) const {
    const int64_t channels = vectors_ * VL;
    const WinogradTile& t = b.winograd;
    const auto& outputs = choose_outputs<NV>();
    constexpr int lanes = NV % 2 ? VL : Two::lanes;
    constexpr int batches = NV * VL / lanes;
    const Plane from{t.w.inputs() * b.products_stride, b.products_stride, lanes};
    const Plane to{b.dilation_h * width_ * channels, b.dilation_w * channels, lanes};
    const Plane cut{4 * NV * VL, NV * VL, lanes};  // for a tile that extends beyond the image
    // Lanes of the gates without a channel hold zeros and are left out.
    const SummedChannels summed =
        l_.few_channels() ? SummedChannels(b.channels, VL, l_.c.C) : SummedChannels(b.channels);
    multiply<S, NV>(b, values, weight + block * VL * l_.tile_weights() * b.channels, summed, false,
                    products);
    for (int64_t k = 0; k < b.images * b.count(); ++k) {
      const int64_t image = k / b.count(), tile = k % b.count();
      const int64_t h0 = b.row(tile / b.columns), w0 = b.column(tile % b.columns);
      const T* in = products + k * NV * VL;
      T* corner = out + ((image * rows + h0) * width_ + w0) * channels + block * VL;
      const int64_t height = pixels_inside(rows - h0, b.dilation_h, t.h.tile);
      const int64_t width = pixels_inside(width_ - w0, b.dilation_w, t.w.tile);
      if (height == t.h.tile && width == t.w.tile) {
        outputs.run(in, from, corner, to, batches);
        continue;
      }
      alignas(64) T whole[4 * 4 * NV * VL];
      outputs.run(in, from, whole, cut, batches);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j)
          std::memcpy(corner + i * to.row + j * to.column, whole + i * cut.row + j * cut.column,
                      NV * VL * sizeof(T));
    }
  }

  template <int NV>
  const auto& choose_outputs() const {
    if constexpr (NV % 2)
      return outputs_;
    else
      return outputs_of_two_;
  }

  int64_t chunk() const { return chunk_length<T>((vectors_ < 4 ? vectors_ : 4) * VL); }

  template <int NV, class In>
  void sweep(int64_t images, In&& d_gates, const T* weight, int64_t block, int64_t begin,
             int64_t end, T* out) const {
    const int64_t channels = vectors_ * VL;
    const int64_t pixel = 4 * l_.Cp;
    const int64_t row = l_.gate_row();
    for (int64_t a = 0; a < sh_; ++a)
      for (int64_t b = 0; b < sw_; ++b) {
        const RunList& list = lists_[a * sw_ + b];
        const int64_t first = begin + ((a - begin) % sh_ + sh_) % sh_;
        const int64_t columns = (width_ - b + sw_ - 1) / sw_;
        if (columns <= 0) continue;
        T* const corner = out + b * channels + block * VL;
        bool add = false;
        const auto add_chunk = [&](const Run* chunk, int size) {
          for (int64_t h = first; h < end; h += sh_) {
            const Run* runs = chunk;
            int number = size;
            if (list.is_dense()) list.limit(runs, number, l_.met(h, l_.mem));
            if (add && number == 0) continue;
            for (int64_t k = 0; k < images; ++k) {
              T* o = corner + (k * (end - begin) + h - begin) * row_size();
              conv_row<S, NV>(
                  d_gates(k) + h / sh_ * row, pixel, runs, number, weight + block * VL * l_.Kg,
                  add ? Start<T>{o, sw_ * channels} : Start<T>{}, o, sw_ * channels, columns);
            }
          }
          add = true;
        };
        if (list.count() > 0)
          list.chunks(chunk(), add_chunk);
        else
          add_chunk(nullptr, 0);  // no tap reaches these pixels, whose gradient is zero
      }
  }

  const Layout<T, VL>& l_;
  int64_t vectors_, width_;
  int64_t sh_, sw_;
  std::unique_ptr<RunList[]> lists_;
  PlaneTransform<S> outputs_;
  PlaneTransform<Two> outputs_of_two_;
};

SNNLSTM_END_ISA
