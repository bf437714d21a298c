// A pretend accelerator for tests: device type "sim" on host memory, two devices, every operator run on the CPU.
//
// What a GPU refuses, it refuses: an operator given tensors of two devices, a CPU generator beside a device tensor,
// and (PyTorch's own checks) `.numpy()` or a device generator beside a CPU tensor. As on a GPU, scalars (tensors
// without dimensions) and indices of `x[index]` may lie on the host, and the default generator is one of its own.
//
// PyTorch keeps the dispatch key PrivateUse1 for backends that live outside of it; here it gets memory, views and
// copies, and one boxed fallback that hands every other operator to the CPU kernel.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;

c10::Device sim(c10::DeviceIndex index) { return c10::Device(kSim, index < 0 ? current : index); }

// Devices and streams: one stream each, and nothing ever to wait for.

struct SimGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return sim(current); }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, SimGuard);

// Memory of the host, labelled with the device that is current when it is asked for.

struct SimAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes == 0 ? nullptr : c10::alloc_cpu(bytes);
    return {memory, memory, &c10::free_cpu, sim(current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
SimAllocator allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

// Generators: the CPU's engine under the device's label, so that equal seeds give equal numbers on both.

struct SimGenerator final : at::CPUGeneratorImpl {
  explicit SimGenerator(c10::DeviceIndex index) : at::CPUGeneratorImpl() {
    device_ = sim(index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct SimHooks final : at::PrivateUse1HooksInterface {
  std::array<at::Generator, kDevices> generators{at::make_generator<SimGenerator>(0), at::make_generator<SimGenerator>(1)};

  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return generators.at(sim(index).index());
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<SimGenerator>(sim(index).index());
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DeviceGuard guard(storage.device());
    auto memory = allocator.allocate(bytes);
    if (const auto kept = std::min(bytes, storage.nbytes())) std::memcpy(memory.get(), storage.data(), kept);
    const_cast<c10::Storage&>(storage).set_data_ptr_noswap(std::move(memory));
    const_cast<c10::Storage&>(storage).set_nbytes(bytes);
  }
};
SimHooks& hooks() {
  static SimHooks instance;
  return instance;
}

// The few operators that a backend must bring: memory, views of it, copies to and from it.

at::Tensor empty_memory_format(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                               std::optional<at::Device> device, std::optional<bool>,
                               std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(sim(-1)));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(sim(-1)));
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor on_host(const at::Tensor& tensor) {  // the same memory as a CPU tensor
  if (tensor.device().is_cpu()) return tensor;
  auto view = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  if (tensor.is_conj()) view = view.conj();
  return view;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) { return on_host(tensor).item(); }

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes() == sizes) return self;  // a view keeps its strides
  auto* impl = self.unsafeGetTensorImpl();
  const size_t bytes = (c10::multiply_integers(sizes) + impl->storage_offset()) * impl->dtype().itemsize();
  if (bytes > impl->storage().nbytes()) hooks().resizePrivateUse1Bytes(impl->storage(), bytes);
  impl->set_sizes_contiguous(sizes);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_contiguous({elements});
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

// Everything else: check what a GPU would check, then run the CPU's kernel.

struct SameDevice {  // the one device of an operator's arguments, found on the way
  const c10::OperatorHandle& op;
  std::optional<c10::Device> found;

  void meet(const at::Tensor& tensor, const std::string& argument) {
    if (!tensor.defined()) return;
    if (tensor.device().is_cpu() && tensor.dim() == 0) return;  // a scalar travels with the launch
    if (!found.has_value()) found = tensor.device();
    TORCH_CHECK(*found == tensor.device(), "Expected all tensors to be on the same device, but found at least two: ",
                *found, " and ", tensor.device(), " (", op.schema().name(), ", argument ", argument, ")");
  }
};

void check_devices(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  SameDevice same{op, std::nullopt};
  for (size_t place = 0; place < arguments.size(); ++place) {
    const auto& value = arguments[place];
    const auto& name = op.schema().arguments()[place].name();
    if (value.isTensor()) {
      same.meet(value.toTensor(), name);
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) same.meet(tensor, name);
    }  // lists of optional tensors are indices, which a GPU takes from the host too
  }
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema().arguments();
  const size_t count = schema.size(), first = stack->size() - count;
  check_devices(op, torch::jit::last(*stack, count));
  // A CPU kernel wants a CPU generator: the device's one lends its state, and gets it back moved on.
  at::Generator ours, lent;
  for (size_t place = 0; place < count; ++place) {
    auto& value = (*stack)[first + place];
    const bool takes_one = schema[place].type()->str() == "Generator?" || schema[place].type()->str() == "Generator";
    if (!takes_one) continue;
    ours = value.isGenerator() ? value.toGenerator() : at::Generator();
    if (!ours.defined()) ours = hooks().getDefaultGenerator(-1);
    TORCH_CHECK(ours.device().type() == kSim, "Expected a 'sim' device type for generator but found '",
                ours.device(), "' (", op.schema().name(), ")");
    lent = at::detail::createCPUGenerator();
    lent.set_state(ours.get_state());
    value = lent;
  }
  at::native::cpu_fallback(op, stack);
  if (ours.defined()) ours.set_state(lent.get_state());
}

void seed(int64_t number) {
  for (c10::DeviceIndex index = 0; index < kDevices; ++index) {
    hooks().getDefaultGenerator(index).unsafeGetGeneratorImpl()->set_current_seed(number);
  }
}
at::Tensor get_state(int64_t index) { return hooks().getDefaultGenerator(index).get_state(); }
void set_state(int64_t index, const at::Tensor& state) { at::Generator(hooks().getDefaultGenerator(index)).set_state(state); }

struct AtLoad {
  AtLoad() { at::RegisterPrivateUse1HooksInterface(&hooks()); }
} at_load;

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("view", &at::native::view);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // under autocast, products in half precision as on a GPU
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
}

TORCH_LIBRARY(pretend_device, m) {  // the CPU key: these take and give host values
  m.def("seed(int number) -> ()", &seed);
  m.def("get_state(int index) -> Tensor", &get_state);
  m.def("set_state(int index, Tensor state) -> ()", &set_state);
}
