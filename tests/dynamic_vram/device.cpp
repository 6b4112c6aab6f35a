// A second device in host memory, as PyTorch's PrivateUse1: with a device type and an allocator of its own, it meets what
// code meets on a graphics card: tensors of two devices cannot be mixed, and are copied from one to the other.
//
// What PyTorch has no formula for here runs on the processor, over the same memory. Device 0 is the only one.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

using at::Tensor;
using c10::IntArrayRef;
using std::optional;

constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);

// -- memory and streams -----------------------------------------------------------------------------------------------

std::atomic<int64_t> capacity{std::numeric_limits<int64_t>::max()}, used{0};

struct HostMemory final : public c10::Allocator {
  static constexpr size_t kHeader = 64;  // holds the size, and keeps what follows aligned
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &c10::detail::deleteNothing, kDevice};
    const auto size = static_cast<int64_t>(bytes);
    if (used.fetch_add(size) + size > capacity) {
      used -= size;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "the device in host memory has no ", bytes, " bytes left");
    }
    auto* header = static_cast<char*>(std::malloc(bytes + kHeader));
    std::memcpy(header, &size, sizeof(size));
    return {header + kHeader, header, &release, kDevice};
  }
  static void release(void* header) {
    int64_t size;
    std::memcpy(&size, header, sizeof(size));
    used -= size;
    std::free(header);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
HostMemory memory;

// Let no more than this many bytes beside those in use be allocated from now on.
void leave(int64_t bytes) { capacity = bytes < 0 ? std::numeric_limits<int64_t>::max() : used + bytes; }

// Everything is done when a call returns, so that streams and events have nothing to do.
struct Guard final : public c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks : public at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
};
Hooks hooks;

struct Register {
  Register() {
    c10::SetAllocator(kType, &memory);
    at::RegisterPrivateUse1HooksInterface(&hooks);
  }
};
const Register registered;

// -- operations -------------------------------------------------------------------------------------------------------

// The same memory as a tensor of the processor.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().is_cpu()) return tensor;
  at::AutoDispatchBelowADInplaceOrView below;
  return at::from_blob(
      tensor.storage().mutable_data(), tensor.sizes(), tensor.strides(), tensor.storage_offset(),
      [keep = tensor.storage()](void*) {}, tensor.options().device(c10::kCPU), c10::Device(c10::kCPU));
}
Tensor on_device(const Tensor& tensor) { return tensor.defined() ? tensor.to(kDevice) : tensor; }

c10::DispatchKeySet key() { return c10::DispatchKeySet(c10::DispatchKey::PrivateUse1); }
Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<c10::Layout>, optional<c10::Device>,
             optional<bool>, optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, key(), c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<c10::Layout>,
                     optional<c10::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, key(), c10::dtype_or_default(dtype));
}
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}
at::Scalar item(const Tensor& tensor) { return on_cpu(tensor).item(); }

Tensor view(const Tensor& tensor, IntArrayRef size) { return at::native::view(tensor, size); }
Tensor as_strided(const Tensor& tensor, IntArrayRef size, IntArrayRef stride, optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, offset);
}
Tensor reshape_alias(const Tensor& tensor, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(tensor, size, stride);
}
Tensor& set_storage(Tensor& tensor, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(tensor, storage, offset, size, stride);
}
Tensor& set_whole_storage(Tensor& tensor, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return at::native::set_storage_cpu_(tensor, storage, 0, count, {});
}
const Tensor& resize(const Tensor& tensor, IntArrayRef size, optional<c10::MemoryFormat> format) {
  return at::native::resize_(tensor, size, format);
}

Tensor convolution(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  at::AutoDispatchBelowADInplaceOrView below;
  optional<Tensor> of_cpu;
  if (bias && bias->defined()) of_cpu = on_cpu(*bias);
  return on_device(at::convolution(on_cpu(input), on_cpu(weight), of_cpu, stride, padding, dilation, transposed,
                                   output_padding, groups));
}
std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  at::AutoDispatchBelowADInplaceOrView below;
  const std::vector<int64_t> bias_size{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [of_input, of_weight, of_bias] = at::convolution_backward(
      on_cpu(gradient), on_cpu(input), on_cpu(weight), at::OptionalIntArrayRef(bias_size), stride, padding, dilation,
      transposed, output_padding, groups, wanted);
  return {on_device(of_input), on_device(of_weight), on_device(of_bias)};
}
// PyTorch's choice among its attentions: 0 is the one of plain products, which consists of operations that are here.
int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, double, bool,
                         optional<double>, bool) {
  return 0;
}

void fallback(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  at::native::cpu_fallback(operation, stack);
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention);
}

TORCH_LIBRARY(hostgpu, library) { library.def("leave(int bytes) -> ()", leave); }
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("view", view);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("resize_", resize);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}
