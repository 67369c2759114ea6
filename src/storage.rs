//! Slices of candle's CPU storages, by their dtype.

use crate::cpu::number::bias::BiasView;
use crate::cpu::number::element::Element;
use crate::cpu::number::rows::RowGrid;
use crate::problem::RowLayout;
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, Device, Layout, Result, Storage, Tensor};

/// Something that reads a query and a key on the CPU, for any dtype.
pub(crate) trait QueryKeyVisitor {
    type Output;
    fn visit<T: Element>(self, q: RowGrid<T>, k: RowGrid<T>) -> Result<Self::Output>;
}

/// Runs `visitor` on the storages of a checked query and key.
pub(crate) fn on_cpu<V: QueryKeyVisitor>(q: &Tensor, k: &Tensor, visitor: V) -> Result<V::Output> {
    let ((q_storage, q_layout), (k_storage, k_layout)) = (q.storage_and_layout(), k.storage_and_layout());
    match (&*q_storage, &*k_storage) {
        (Storage::Cpu(q), Storage::Cpu(k)) => visit_storages(q, q_layout, k, k_layout, visitor),
        _ => not_on_cpu(q.device()),
    }
}

/// [`on_cpu`] for storages that candle has already taken apart.
pub(crate) fn visit_storages<V: QueryKeyVisitor>(
    q: &CpuStorage,
    q_layout: &Layout,
    k: &CpuStorage,
    k_layout: &Layout,
    visitor: V,
) -> Result<V::Output> {
    let (q_rows, k_rows) = (RowLayout::new(q_layout), RowLayout::new(k_layout));
    match (q, k) {
        (CpuStorage::F64(q), CpuStorage::F64(k)) => visitor.visit(RowGrid::new(q, q_rows), RowGrid::new(k, k_rows)),
        (CpuStorage::F32(q), CpuStorage::F32(k)) => visitor.visit(RowGrid::new(q, q_rows), RowGrid::new(k, k_rows)),
        (CpuStorage::F16(q), CpuStorage::F16(k)) => visitor.visit(RowGrid::new(q, q_rows), RowGrid::new(k, k_rows)),
        (CpuStorage::BF16(q), CpuStorage::BF16(k)) => visitor.visit(RowGrid::new(q, q_rows), RowGrid::new(k, k_rows)),
        // Problem has checked the dtypes.
        _ => bail!(
            "query and key: expected one dtype of f64, f32, f16 and bf16 for both, got {:?} and {:?}; \
             convert them with to_dtype",
            q.dtype(),
            k.dtype()
        ),
    }
}

pub(crate) fn cpu_slice<T: Element>(storage: &Storage) -> Result<&[T]> {
    match storage {
        Storage::Cpu(storage) => storage.as_slice::<T>(),
        other => not_on_cpu(&other.device()),
    }
}

/// A bias in the accumulator's dtype, as a view of four axes.
pub(crate) fn bias_view<'a, A: Element>(storage: &'a Storage, layout: &Layout) -> Result<BiasView<'a, A>> {
    let strides = layout.stride();
    Ok(BiasView {
        data: cpu_slice(storage)?,
        offset: layout.start_offset(),
        strides: [strides[0], strides[1], strides[2], strides[3]],
    })
}

pub(crate) fn not_on_cpu<R>(device: &Device) -> Result<R> {
    bail!(
        "device: expected the CPU, got {:?}; compressed attention has no kernels for it in this version, \
         move the tensors with to_device(&Device::Cpu)",
        device.location()
    )
}
