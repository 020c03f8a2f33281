// The threads of a block on the CPU: they take turns, each running as far as it gets without the
// others, which is to the next barrier or to an instruction that its warp carries out together.
//
// What a GPU may do, this does: a thread runs ahead of all others wherever no barrier holds it. So
// a barrier that is missing shows, as shared memory that is read before it is written (it begins as
// NaN) or, when the order of threads is reversed, written before it is read.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <functional>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace ffa::FFA_ISA {

// An instruction of a whole warp: what its 32 lanes bring, in their order.
using Together = void (*)(void* const* lanes);

class Turns {
 public:
  explicit Turns(int count) : count_(count), threads_(new Thread[count]) {
    for (int i = 0; i < count; ++i) {
      threads_[i].stack.reset(new char[kStackBytes]);
      threads_[i].context.stack = threads_[i].stack.get();
      threads_[i].context.bytes = kStackBytes;
    }
  }

  // program(thread) for every thread, which may call `wait`.
  void run(bool reversed, const std::function<void(int)>& program) {
    reversed_ = reversed;
    program_ = &program;
    for (int i = 0; i < count_; ++i) prepare(i);
    do {
      for (int i = 0; i < count_; i += 32) run_warp(reversed ? count_ - 32 - i : i);
    } while (pass_barrier());
  }

  // At the barrier of the block or, given an instruction, at that of the warp, to which this thread
  // brings `lane`.
  void wait(int thread, Together instruction = nullptr, void* lane = nullptr) {
    Thread& me = threads_[thread];
    me.state = instruction == nullptr ? State::kAtBarrier : State::kInWarp;
    me.instruction = instruction;
    me.lane = lane;
    leave(thread);
  }

 private:
  // Clearing the shadow of a stack is most of what a turn costs under the address sanitizer.
  static constexpr size_t kStackBytes = 16 << 10;

  enum class State { kReady, kAtBarrier, kInWarp, kDone };

  struct Context {
    ucontext_t machine = {};
    void* fake_stack = nullptr;
    const void* stack = nullptr;
    size_t bytes = 0;
  };

  struct Thread {
    std::unique_ptr<char[]> stack;
    Context context;
    State state = State::kDone;
    Together instruction = nullptr;
    void* lane = nullptr;
  };

  [[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "serial grid: %s\n", what);
    abort();
  }

  void prepare(int i) {
    Thread& thread = threads_[i];
    thread.state = State::kReady;
    ucontext_t& machine = thread.context.machine;
    getcontext(&machine);
    machine.uc_stack.ss_sp = thread.stack.get();
    machine.uc_stack.ss_size = kStackBytes;
    machine.uc_link = nullptr;
    // A context's arguments are ints.
    const uint64_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(&machine, reinterpret_cast<void (*)()>(&Turns::enter), 3,
                static_cast<unsigned>(self), static_cast<unsigned>(self >> 32), i);
  }

  static void enter(unsigned low, unsigned high, int i) {
    Turns& turns = *reinterpret_cast<Turns*>(low | uint64_t{high} << 32);
    // The first thread ever to run comes from the caller's stack.
    Context& own = turns.own_;
    const bool first = own.stack == nullptr;
    arrive(nullptr, first ? &own.stack : nullptr, first ? &own.bytes : nullptr);
    (*turns.program_)(i);
    turns.threads_[i].state = State::kDone;
    turns.leave(i);
  }

  void run_warp(int first) {
    do {
      pass_on(own_, first + (reversed_ ? 31 : 0), false);
    } while (carry_out(&threads_[first]));
  }

  void leave(int i) {
    const Thread& me = threads_[i];
    pass_on(threads_[i].context, i, me.state == State::kDone);
  }

  // The turn goes to the next thread of the warp that is ready, from `i` on, or back to `run_warp`.
  void pass_on(Context& from, int i, bool done) {
    const int first = i / 32 * 32, step = reversed_ ? -1 : 1;
    while (i >= first && i < first + 32 && threads_[i].state != State::kReady) i += step;
    const bool inside = i >= first && i < first + 32;
    Context& to = inside ? threads_[i].context : own_;
    if (&from == &to) return;
    depart(done ? nullptr : &from.fake_stack, to.stack, to.bytes);
    swapcontext(&from.machine, &to.machine);
    arrive(from.fake_stack, nullptr, nullptr);
  }

  bool carry_out(Thread* warp) {
    void* lanes[32];
    int waiting = 0, alike = 0;
    for (int i = 0; i < 32; ++i) {
      waiting += warp[i].state == State::kInWarp;
      alike += warp[i].instruction == warp[0].instruction;
      lanes[i] = warp[i].lane;
    }
    if (waiting == 0) return false;
    if (waiting < 32 || alike < 32) fail("the lanes of a warp are not at the same instruction");
    warp[0].instruction(lanes);
    for (int i = 0; i < 32; ++i) warp[i].state = State::kReady;
    return true;
  }

  bool pass_barrier() {
    int waiting = 0, done = 0;
    for (int i = 0; i < count_; ++i) {
      waiting += threads_[i].state == State::kAtBarrier;
      done += threads_[i].state == State::kDone;
    }
    if (done == count_) return false;
    if (waiting < count_) fail("threads wait at a barrier that others of their block never reach");
    for (int i = 0; i < count_; ++i) threads_[i].state = State::kReady;
    return true;
  }

  // The address sanitizer must know on which stack it is.
#if defined(__SANITIZE_ADDRESS__)
  static void depart(void** fake_stack, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
  }
  static void arrive(void* fake_stack, const void** stack, size_t* bytes) {
    __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
  }
#else
  static void depart(void**, const void*, size_t) {}
  static void arrive(void*, const void**, size_t*) {}
#endif

  int count_;
  bool reversed_ = false;
  std::unique_ptr<Thread[]> threads_;
  const std::function<void(int)>* program_ = nullptr;
  Context own_;
};

}  // namespace ffa::FFA_ISA
