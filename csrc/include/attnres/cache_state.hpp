// Bookkeeping of a block cache: which slots are sealed, which one is open, and whether the open one
// holds anything yet. The tensors live elsewhere; here are only counters and the rules.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace attnres {

// Slots 0 .. sealed-1 hold finished blocks and never change again until reset(). Slot `sealed` is
// open: it is the running partial sum, so finishing a block is counting one up, not copying.
class CacheState {
 public:
  explicit CacheState(int64_t capacity) : capacity_(capacity) {
    if (capacity < 1) {
      throw std::invalid_argument("block cache: capacity is " + std::to_string(capacity) +
                                  ", expected at least 1 slot");
    }
  }

  int64_t capacity() const { return capacity_; }
  int64_t sealed() const { return sealed_; }
  bool full() const { return sealed_ == capacity_; }
  // Whether the open slot holds a partial sum, so that the next write adds to it.
  bool open_holds_partial() const { return open_holds_partial_; }
  // Slots that a read attends over.
  int64_t num_sources() const { return sealed_ + (open_holds_partial_ ? 1 : 0); }

  // The slot that takes the next write.
  int64_t open_slot() const {
    if (full()) {
      throw std::runtime_error("block cache: all " + std::to_string(capacity_) +
                               " slots are closed, none is left to write to; make the cache "
                               "larger, or reset it before the next forward");
    }
    return sealed_;
  }

  // Notes that the open slot is written to; true when the write adds to what the slot holds.
  bool begin_write() {
    open_slot();
    const bool add = open_holds_partial_;
    open_holds_partial_ = true;
    return add;
  }

  // Finishes the open block: its slot is read-only from here on.
  void close() {
    const int64_t slot = open_slot();
    if (!open_holds_partial_) {
      throw std::runtime_error("block cache: slot " + std::to_string(slot) +
                               " holds nothing and cannot be closed");
    }
    ++sealed_;
    open_holds_partial_ = false;
  }

  void reset() {
    sealed_ = 0;
    open_holds_partial_ = false;
  }

 private:
  int64_t capacity_;
  int64_t sealed_ = 0;
  bool open_holds_partial_ = false;
};

}  // namespace attnres
