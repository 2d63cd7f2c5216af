// A device that is not the CPU, on machines without one: PyTorch's PrivateUse1 with the host's memory behind it.
//
// Memory is poisoned when it is allocated. Operators run in the CPU's kernels on the same bytes, and refuse to mix devices as
// CUDA does. Collectives are gloo's, with what NCCL demands of tensors. Streams and events are Python's (emulated.py): here an
// operator is done when its call returns.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <unordered_set>

namespace {

using at::Tensor;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int kPoison = 0x7f;  // a NaN in bfloat16 and float16, 3.4e38 in float32

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kDevice; }

// ---- memory ----

std::mutex memory_lock;
std::vector<uint64_t> freed;               // addresses, for the sanitizer
bool record_frees = false;
std::map<uint64_t, size_t> pinned;         // begin -> bytes of page-locked host memory

void note_free(void* address) {
  std::lock_guard<std::mutex> guard(memory_lock);
  pinned.erase(reinterpret_cast<uint64_t>(address));
  if (record_frees && address) freed.push_back(reinterpret_cast<uint64_t>(address));
}

void release(void* address) {
  note_free(address);
  free(address);
}

void* poisoned(size_t bytes) {
  void* address = nullptr;
  if (bytes == 0) return address;
  TORCH_CHECK(posix_memalign(&address, 512, bytes) == 0, "the emulated device is out of memory");
  memset(address, kPoison, bytes);
  return address;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* address = poisoned(bytes);
    return {address, address, &release, c10::Device(kDevice, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override { memcpy(target, source, bytes); }
} device_allocator;
REGISTER_ALLOCATOR(kDevice, &device_allocator);

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* address = poisoned(bytes);
    if (address) {
      std::lock_guard<std::mutex> guard(memory_lock);
      pinned[reinterpret_cast<uint64_t>(address)] = bytes;
    }
    return {address, address, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override { memcpy(target, source, bytes); }
} pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> guard(memory_lock);
  auto after = pinned.upper_bound(reinterpret_cast<uint64_t>(data));
  if (after == pinned.begin()) return false;
  auto entry = std::prev(after);
  return reinterpret_cast<uint64_t>(data) < entry->first + entry->second;
}

// ---- what PyTorch asks a device ----

thread_local c10::DeviceIndex current_device = 0;

c10::Stream default_stream(c10::Device device) { return c10::Stream(c10::Stream::DEFAULT, device); }

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kDevice;
  c10::DeviceType type() const override { return kDevice; }
  c10::Device getDevice() const override { return {kDevice, current_device}; }
  void setDevice(c10::Device device) const override { current_device = std::max<c10::DeviceIndex>(0, device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { setDevice(device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device device) const override { return default_stream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return default_stream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return default_stream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return default_stream(stream.device()); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = &current_device;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(uint64_t seed = c10::default_rng_seed_val) : at::CPUGeneratorImpl(seed) {
    device_ = c10::Device(kDevice, 0);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

void resize_storage(const c10::Storage& storage, size_t bytes) {
  auto fresh = device_allocator.allocate(bytes);
  if (storage.data()) memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

struct DeviceHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current_device, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<DeviceGenerator>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<DeviceGenerator>(); }
  at::Device getDeviceFromPtr(void*) const override { return {kDevice, 0}; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override { resize_storage(storage, bytes); }
};

// ---- the same bytes as a tensor of the CPU, and back ----

Tensor host_view(const Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  auto options = at::TensorOptions().device(at::kCPU).dtype(tensor.dtype());
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  auto* begin = static_cast<char*>(tensor.storage().mutable_data()) + tensor.storage_offset() * tensor.element_size();
  return at::from_blob(begin, tensor.sizes(), tensor.strides(), [](void*) {}, options);
}

Tensor device_tensor(c10::Storage storage, const Tensor& like, int64_t offset) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), offset);
  return result;
}

// A kernel's fresh result, kept alive by the storage that shows its bytes as the device's.
Tensor adopt(const Tensor& host) {
  auto* kept = new c10::Storage(host.storage());
  auto drop = [](void* held) {
    auto* storage = static_cast<c10::Storage*>(held);
    note_free(const_cast<void*>(storage->data()));
    delete storage;
  };
  c10::DataPtr data(kept->mutable_data(), kept, drop, c10::Device(kDevice, 0));
  c10::Storage storage(c10::Storage::use_byte_size_t(), host.storage().nbytes(), std::move(data), &device_allocator, true);
  return device_tensor(std::move(storage), host, host.storage_offset());
}

// Device tensors of one call and the host's views of them, so that results which are arguments, or views of them, are found.
struct Arguments {
  std::vector<Tensor> given, views, from_host;

  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!on_device(tensor)) {
      if (tensor.dim() > 0) from_host.push_back(tensor);
      return tensor;
    }
    for (size_t i = 0; i < given.size(); ++i)
      if (given[i].is_same(tensor)) return views[i];
    given.push_back(tensor);
    views.push_back(host_view(tensor));
    return views.back();
  }

  Tensor to_device(const Tensor& result) const {
    if (!result.defined() || result.device().type() != at::kCPU) return result;
    for (size_t i = 0; i < views.size(); ++i)
      if (views[i].is_same(result)) return given[i];
    auto* data = static_cast<const char*>(result.numel() ? result.const_data_ptr() : nullptr);
    for (const auto& tensor : given) {
      auto* begin = static_cast<const char*>(tensor.storage().data());
      if (data && begin && data >= begin && data < begin + tensor.storage().nbytes())
        return device_tensor(tensor.storage(), result, (data - begin) / result.element_size());
    }
    return adopt(result);
  }

  // CUDA takes scalars of the CPU beside its own tensors, and indices of the CPU, and nothing else.
  void check_devices(const std::string& name) const {
    static const std::unordered_set<std::string> mixing{"aten::_copy_from", "aten::index", "aten::index_put_",
                                                        "aten::_index_put_impl_", "aten::index_put"};
    TORCH_CHECK(from_host.empty() || given.empty() || mixing.count(name),
                "Expected all tensors to be on the same device, but found at least two devices, emu:0 and cpu! (", name,
                " with a CPU tensor of shape ", from_host.front().sizes(), ")");
  }

  // An out= argument that the kernel has given another size.
  void follow_sizes() const {
    for (size_t i = 0; i < views.size(); ++i)
      if (views[i].sizes() != given[i].sizes())
        given[i].unsafeGetTensorImpl()->shallow_copy_from(adopt(views[i]).getIntrusivePtr());
  }
};

// A generator of the device draws what one of the CPU with its state draws.
struct BorrowedGenerator {
  at::Generator own, host;
  explicit BorrowedGenerator(at::Generator generator)
      : own(std::move(generator)), host(at::make_generator<at::CPUGeneratorImpl>()) {
    host.set_state(own.get_state());
  }
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  Arguments arguments;
  std::vector<BorrowedGenerator> generators;
  for (auto at = stack->end() - count; at != stack->end(); ++at) {
    if (at->isTensor()) {
      *at = arguments.to_host(at->toTensor());
    } else if (at->isTensorList()) {
      auto list = at->toTensorVector();
      for (auto& tensor : list) tensor = arguments.to_host(tensor);
      *at = c10::IValue(list);
    } else if (at->isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& tensor : at->toOptionalTensorVector())
        list.push_back(tensor ? std::optional<Tensor>(arguments.to_host(*tensor)) : std::nullopt);
      *at = c10::IValue(list);
    } else if (at->isDevice() && at->toDevice().type() == kDevice) {
      *at = c10::IValue(c10::Device(at::kCPU));
    } else if (at->isGenerator() && at->toGenerator().defined() && at->toGenerator().device().type() == kDevice) {
      generators.emplace_back(at->toGenerator());
      *at = c10::IValue(generators.back().host);
    }
  }
  arguments.check_devices(schema.name());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& generator : generators) generator.own.set_state(generator.host.get_state());
  arguments.follow_sizes();
  for (auto at = stack->end() - schema.returns().size(); at != stack->end(); ++at) {
    if (at->isTensor()) {
      *at = arguments.to_device(at->toTensor());
    } else if (at->isTensorList()) {
      auto list = at->toTensorVector();
      for (auto& tensor : list) tensor = arguments.to_device(tensor);
      *at = c10::IValue(list);
    }
  }
}

// ---- operators that make, view and copy memory ----

using Sizes = c10::SymIntArrayRef;

Tensor empty(Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_allocator, keys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  host_view(target).copy_(host_view(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (target.sizes() != source.sizes()) target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar item(const Tensor& tensor) { return host_view(tensor).item(); }

const Tensor& resize(const Tensor& self, Sizes size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() == C10_AS_INTARRAYREF_SLOW(size)) return self;
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t bytes = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (bytes > impl->storage().nbytes()) resize_storage(impl->storage(), bytes);
  return self;
}

Tensor as_strided(const Tensor& self, Sizes size, Sizes stride, std::optional<c10::SymInt> offset) {
  auto given = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), given);
}

Tensor view(const Tensor& self, Sizes size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& result, at::Storage storage, c10::SymInt offset, Sizes size, Sizes stride) {
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  auto begin = offset.guard_int(__FILE__, __LINE__);
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), begin);
  } else {
    impl->set_storage_offset(begin);
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  }
  return result;
}

Tensor& set_tensor(Tensor& result, const Tensor& source) {
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return result;
}

void record_stream(Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("resize_", resize);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("record_stream", record_stream);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

// ---- collectives: gloo's on the same bytes, with NCCL's demands ----

using Tensors = std::vector<Tensor>;
using Pending = c10::intrusive_ptr<c10d::Work>;
using c10d::OpType;
using c10d::ReduceOp;

struct Done final : c10d::Work {
  Tensors outputs;
  c10::intrusive_ptr<at::ivalue::Future> future;
  Done(OpType type, Tensors results)
      : c10d::Work(-1, type),
        outputs(std::move(results)),
        future(c10::make_intrusive<at::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))) {
    future->markCompleted(c10::IValue(outputs));
  }
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
  Tensors result() override { return outputs; }
};

Pending done(OpType type, Tensors outputs) { return c10::make_intrusive<Done>(type, std::move(outputs)); }

Tensor taken(const Tensor& tensor) {
  TORCH_CHECK(on_device(tensor), "No backend type associated with device type cpu: NCCL takes a device's tensors alone, given ",
              tensor.sizes(), " ", tensor.dtype(), " on ", tensor.device());
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "Tensors must be contiguous");
  auto type = tensor.scalar_type();
  TORCH_CHECK(type != at::kShort && type != at::kUInt16 && type != at::kUInt32,
              "Input tensor data type is not supported for NCCL process group: ", tensor.dtype());
  return host_view(tensor);
}

Tensors taken(const Tensors& tensors) {
  Tensors views;
  for (const auto& tensor : tensors) views.push_back(taken(tensor));
  return views;
}

struct Collectives final : c10d::Backend {
  c10::intrusive_ptr<c10d::Backend> gloo;
  Collectives(c10::intrusive_ptr<c10d::Backend> inner, int rank, int size) : c10d::Backend(rank, size), gloo(std::move(inner)) {}
  const std::string getBackendName() const override { return "emuccl"; }

  void sum(const Tensor& host, const ReduceOp& op) {
    c10d::AllreduceOptions options;
    bool mean = op == ReduceOp::AVG;
    options.reduceOp = mean ? ReduceOp(ReduceOp::SUM) : op;
    Tensors one{host};
    gloo->allreduce(one, options)->wait();
    if (mean) host.div_(getSize());
  }
  Pending broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto views = taken(tensors);
    gloo->broadcast(views, options)->wait();
    return done(OpType::BROADCAST, tensors);
  }
  Pending allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    for (const auto& host : taken(tensors)) sum(host, options.reduceOp);
    return done(OpType::ALLREDUCE, tensors);
  }
  Pending allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    for (const auto& host : taken(tensors)) sum(host, options.reduceOp);
    return done(OpType::ALLREDUCE_COALESCED, tensors);
  }
  Pending reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto views = taken(tensors);
    gloo->reduce(views, options)->wait();
    return done(OpType::REDUCE, tensors);
  }
  Pending allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    std::vector<Tensors> whole;
    for (const auto& list : outputs) whole.push_back(taken(list));
    auto own = taken(inputs);
    gloo->allgather(whole, own, options)->wait();
    return done(OpType::ALLGATHER, inputs);
  }
  Pending _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    auto whole = taken(output).view(-1), own = taken(input).contiguous().view(-1);
    TORCH_CHECK(whole.numel() == own.numel() * getSize(), "output tensor size must be equal to world_size times input tensor size");
    std::vector<Tensors> parts{whole.chunk(getSize())};
    Tensors inputs{own};
    gloo->allgather(parts, inputs, options)->wait();
    return done(OpType::_ALLGATHER_BASE, {output});
  }
  Pending allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    for (size_t i = 0; i < outputs.size(); ++i) _allgather_base(outputs[i], inputs[i], options);
    return done(OpType::COALESCED, outputs);
  }
  Pending _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto whole = taken(input).clone();
    sum(whole, options.reduceOp);
    taken(output).view(-1).copy_(whole.view(-1).chunk(getSize())[getRank()]);
    return done(OpType::_REDUCE_SCATTER_BASE, {output});
  }
  Pending reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    for (size_t i = 0; i < outputs.size(); ++i) _reduce_scatter_base(outputs[i], inputs[i], options);
    return done(OpType::COALESCED, outputs);
  }
  Pending reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& options) override {
    auto whole = at::stack(taken(inputs.front()));
    sum(whole, options.reduceOp);
    taken(outputs.front()).copy_(whole[getRank()]);
    return done(OpType::REDUCE_SCATTER, outputs);
  }
  Pending barrier(const c10d::BarrierOptions&) override {
    gloo->barrier(c10d::BarrierOptions())->wait();
    return done(OpType::BARRIER, {});
  }
  void startCoalescing() override {}
  Pending endCoalescing() override { return done(OpType::COALESCED, {}); }
};

std::vector<uint64_t> drain_frees() {
  std::lock_guard<std::mutex> guard(memory_lock);
  return std::exchange(freed, {});
}

}  // namespace

PYBIND11_MODULE(emulated_backend, module) {
  module.def("start", [] { at::RegisterPrivateUse1HooksInterface(new DeviceHooks()); });
  module.def("host_view", [](const Tensor& tensor) { return host_view(tensor); });
  module.def("record_frees", [](bool on) { record_frees = on; });
  module.def("drain_frees", &drain_frees);
  module.def("become", [](const Tensor& tensor, const Tensor& other) {
    tensor.unsafeGetTensorImpl()->shallow_copy_from(other.getIntrusivePtr());
  });
  module.def("collectives", [](c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Collectives>(std::move(gloo), rank, size);
  });
}
