// How the rows of all images are cut into the tasks of a step.
#pragma once

#include "layout.h"

SNNLSTM_BEGIN_ISA

// The tasks are blocks of rows of all N images. The last block of an image takes the rows that no
// pooling window covers, too. Each sample has an image. If samples have lengths, the longest sample
// has the first image, so that the samples that are not padded at a step have the first images.
struct RowTasks {
  int64_t rows, per_image, count;
  int64_t most_together;  // the most tasks of a group
  template <class L>
  RowTasks(const L& l, const PassArgs& a, int threads, bool even)
      : rows(l.task_rows(threads)), a_(&a), threads_(threads) {
    const int64_t covered = l.Hp * l.c.pool_h;
    per_image = covered > 0 ? (covered + rows - 1) / rows : 1;
    count = l.c.N * per_image;
    most_together = per_image == 1 ? l.images_together(threads, even) : 1;
    image_rows_ = l.Ho;
  }
  // Returns the tasks of the images that are not padded at step t.
  RowTasks at(int64_t t) const {
    RowTasks some = *this;
    if (!a_->lengths) return some;
    some.count = 0;
    while (some.count < count && steps(some.count) > t) some.count += per_image;
    if (some.count < count && most_together > 1) {
      const int64_t each = (some.count + threads_ - 1) / threads_;
      some.most_together = each < 1 ? 1 : each < most_together ? each : most_together;
    }
    return some;
  }
  // sample() returns the sample of an image, and steps() the steps of a task's sample. A call of
  // one step may get, as lengths, how many steps each sample has left.
  int64_t sample(int64_t image) const { return a_->order ? a_->order[image] : image; }
  int64_t steps(int64_t task) const {
    const int64_t T = a_->cell.T;
    const int64_t length = a_->lengths ? a_->lengths[sample(image(task))] : T;
    return length < T ? length : T;
  }
  int64_t images() const { return count / per_image; }
  // The tasks of a group share the weights that a thread reads. A group has tasks of whole images,
  // or one task.
  int64_t groups() const { return (count + most_together - 1) / most_together; }
  int64_t first(int64_t group) const { return count > 0 ? count * group / groups() : 0; }
  int64_t together(int64_t group) const { return first(group + 1) - first(group); }
  int64_t image(int64_t task) const { return task / per_image; }
  int64_t begin(int64_t task) const { return task % per_image * rows; }
  int64_t end(int64_t task) const {
    return task % per_image == per_image - 1 ? image_rows_ : begin(task) + rows;
  }
  int64_t most_rows() const {
    const int64_t last = image_rows_ - (per_image - 1) * rows;
    return rows > last ? (per_image > 1 ? rows : last) : last;
  }

 private:
  const PassArgs* a_;
  int threads_;
  int64_t image_rows_;
};

SNNLSTM_END_ISA
