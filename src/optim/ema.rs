//! Exponential moving averages of parameters.

use super::update::{for_chunks, is_recording};
use crate::{
    DType, Device, Result, Tensor,
    cpu::{
        parallel::{Shared, SharedMut},
        simd::simd_of,
    },
    dtype::Real,
    ensure, for_real,
    nn::Param,
};
use std::{collections::HashMap, ops::Range};

/// A running average of parameters and buffers: average = d * average + (1 - d) * value with d = `decay`, or
/// min(decay, (1 + t) / (10 + t)) at update t = 0, 1, .. with warm-up. Half-precision values are averaged in f32;
/// integers are copied.
pub struct Ema {
    decay: f64,
    warmup: bool,
    updates: u64,
    sources: Vec<Param>,
    averages: Vec<Param>,
    /// The decay on each GPU that averages are on.
    numbers: Vec<Tensor>,
}

impl Ema {
    /// An average that starts at the present values.
    ///
    /// # Errors
    /// If `decay` is not within 0..=1.
    #[track_caller]
    pub fn new(params: &[Param], decay: f64, warmup: bool) -> Result<Ema> {
        ensure!((0.0..=1.0).contains(&decay), "ema", "decay is {decay}");
        let start = |p: &Param| {
            let value = p.value();
            let wide = if value.dtype().is_half() { value.to_dtype(DType::F32)? } else { value };
            Ok(Param::new(p.name(), wide))
        };
        let averages = params.iter().map(start).collect::<Result<_>>()?;
        Ok(Ema { decay, warmup, updates: 0, sources: params.to_vec(), averages, numbers: Vec::new() })
    }

    /// Takes the present values in. A graph can record it, after it has run once in the ordinary way; see
    /// `next_update`.
    ///
    /// # Errors
    /// While a graph is recorded: if this was not so.
    pub fn update(&mut self) -> Result<()> {
        let decay = self.decay_now();
        if is_recording() {
            return average(&self.averages, &self.sources, decay, Some(&self.numbers));
        }
        #[cfg(gpu)]
        gpu::write(&mut self.numbers, &self.averages, decay)?;
        average(&self.averages, &self.sources, decay, Some(&self.numbers))?;
        self.updates += 1;
        Ok(())
    }

    /// To be called before each launch of a graph in which an update was recorded: writes the decay to the device, and
    /// counts the update.
    ///
    /// # Errors
    /// If a graph is being recorded.
    #[cfg(gpu)]
    pub fn next_update(&mut self) -> Result<()> {
        let decay = self.decay_now();
        gpu::write(&mut self.numbers, &self.averages, decay)?;
        self.updates += 1;
        Ok(())
    }

    fn decay_now(&self) -> f64 {
        let t = self.updates as f64;
        if self.warmup { self.decay.min((1.0 + t) / (10.0 + t)) } else { self.decay }
    }

    /// Runs `f` with the averages in the parameters' place: how a model is evaluated with them.
    ///
    /// # Errors
    /// Those of `f`; the parameters have their own values again then.
    pub fn with_average<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let own: Vec<Tensor> = self.sources.iter().map(Param::value).collect();
        let mut swapped = Ok(());
        for (p, average) in self.sources.iter().zip(&self.averages) {
            swapped = swapped.and_then(|()| p.set(&average.value().to_dtype(p.value().dtype())?));
        }
        let result = swapped.and_then(|()| f());
        for (p, own) in self.sources.iter().zip(&own) {
            p.set(own)?;
        }
        result
    }

    /// Averages by name.
    pub fn averages(&self) -> Vec<(String, Tensor)> {
        self.averages.iter().map(|p| (p.name().to_owned(), p.value())).collect()
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Restores what [`averages`](Self::averages) and [`updates`](Self::updates) gave, in any order: files sort names.
    ///
    /// # Errors
    /// If names or shapes do not fit; nothing has been changed then.
    #[track_caller]
    pub fn load(&mut self, averages: &[(String, Tensor)], updates: u64) -> Result<()> {
        let saved: HashMap<&str, &Tensor> = averages.iter().map(|(name, t)| (name.as_str(), t)).collect();
        let fitting = |p: &Param| {
            let (value, t) = (p.value(), *saved.get(p.name())?);
            (value.shape() == t.shape() && value.dtype() == t.dtype()).then_some(t)
        };
        let values: Option<Vec<&Tensor>> = self.averages.iter().map(fitting).collect();
        let values = values.filter(|values| values.len() == averages.len());
        let Some(values) = values else {
            crate::bail!("ema", "the saved averages are those of another model");
        };
        for (p, t) in self.averages.iter().zip(values) {
            p.set(t)?;
        }
        self.updates = updates;
        Ok(())
    }
}

/// target = decay * target + (1 - decay) * source for every pair, in one pass over the memory: the momentum
/// update of MoCo's key encoder. Integers are copied. In a recorded graph `decay` stays what it is at the recording.
///
/// # Errors
/// If the lists differ in length, or a pair in shape.
#[track_caller]
pub fn average_into(targets: &[Param], sources: &[Param], decay: f64) -> Result<()> {
    average(targets, sources, decay, None)
}

/// The same; on GPUs the decay is read from `numbers` where these are given.
#[cfg_attr(not(gpu), allow(unused_variables))]
#[track_caller]
fn average(targets: &[Param], sources: &[Param], decay: f64, numbers: Option<&[Tensor]>) -> Result<()> {
    ensure!(
        targets.len() == sources.len(),
        "average",
        "{} targets, {} sources",
        targets.len(),
        sources.len()
    );
    let mut pairs: Vec<(Device, Vec<Pair>)> = Vec::new();
    for (target, source) in targets.iter().zip(sources) {
        let (old, new) = (target.value(), source.value());
        ensure!(
            old.shape() == new.shape(),
            "average",
            "{} has shape {:?}, {} {:?}",
            target.name(),
            old.shape(),
            source.name(),
            new.shape()
        );
        let pair = (target, new.transferred(old.device())?.contiguous()?);
        match pairs.iter_mut().find(|(device, _)| *device == old.device()) {
            Some((_, pairs)) => pairs.push(pair),
            None => pairs.push((old.device(), vec![pair])),
        }
    }
    for (device, pairs) in pairs {
        match device {
            Device::Cpu => average_on_cpu(&pairs, decay)?,
            #[cfg(gpu)]
            _ => gpu::average(device, pairs, decay, numbers)?,
            #[cfg(not(gpu))]
            _ => {}
        }
    }
    Ok(())
}

/// An average and what goes into it, contiguous and on one device.
type Pair<'a> = (&'a Param, Tensor);

fn average_on_cpu(pairs: &[Pair], decay: f64) -> Result<()> {
    let mut floats = Vec::new();
    for (target, new) in pairs {
        let old = target.value();
        let new = new.to_dtype(old.dtype())?;
        if matches!(old.dtype(), DType::F32 | DType::F64) {
            floats.push((target, new));
        } else if old.dtype().is_half() {
            let d = |x: &Tensor, factor: f64| x.to_dtype(DType::F32)?.mul_scalar(factor);
            target.set(&d(&old, decay)?.add(&d(&new, 1.0 - decay)?)?.to_dtype(old.dtype())?)?;
        } else {
            target.set(&new)?;
        }
    }
    let mut locks: Vec<_> = floats.iter().map(|(target, _)| target.lock()).collect();
    let lengths: Vec<usize> = floats.iter().map(|(_, new)| new.numel()).collect();
    let mut runs: Vec<Box<dyn Fn(Range<usize>) + Send + Sync>> = Vec::new();
    for (lock, (_, new)) in locks.iter_mut().zip(&floats) {
        for_real!(new.dtype(), "average", T => {
            let (target, source) = (SharedMut::new(lock.elements::<T>()), Shared(new.cpu_ptr::<T>()));
            runs.push(Box::new(move |range| {
                let x = unsafe { std::slice::from_raw_parts(source.ptr().add(range.start), range.len()) };
                lerp(unsafe { target.slice(range) }, x, decay);
            }));
        });
    }
    for_chunks(&lengths, |i, range| runs[i](range));
    Ok(())
}

fn lerp<R: Real>(average: &mut [R], x: &[R], decay: f64) {
    let (keep, take) = (R::of(decay), R::of(1.0 - decay));
    simd_of::<R, _>(
        #[inline(always)]
        || average.iter_mut().zip(x).for_each(|(a, &x)| *a = keep * *a + take * x),
    );
}

#[cfg(gpu)]
mod gpu {
    use super::Pair;
    use crate::{
        DType, Device, Result, Tensor, bail,
        gpu::{self, Many, elementwise, sys},
        nn::Param,
    };

    const OP: &str = "average";

    /// Writes the decay to every GPU that averages are on.
    pub fn write(numbers: &mut Vec<Tensor>, averages: &[Param], decay: f64) -> Result<()> {
        let mut seen = Vec::new();
        for p in averages {
            let device = p.value().device();
            if device != Device::Cpu && !seen.contains(&device) {
                seen.push(device);
                let decay = Device::Cpu.scope(|| Tensor::from_slice(&[decay], [1]))?;
                gpu::write_numbers(numbers, device, &decay)?;
            }
        }
        Ok(())
    }

    /// In place, many in a launch.
    pub fn average(device: Device, pairs: Vec<Pair>, decay: f64, numbers: Option<&[Tensor]>) -> Result<()> {
        let number = numbers.map(|all| gpu::numbers_on(all, device));
        let at = match number {
            None => std::ptr::null(),
            Some(Some(number)) => {
                gpu::touch(number);
                number.gpu_ptr().cast::<f64>().cast_const()
            }
            Some(None) => bail!(OP, "an update is recorded after it has run once in the ordinary way"),
        };
        let mut sources = Vec::with_capacity(pairs.len());
        for (target, new) in &pairs {
            let dtype = target.value().dtype();
            // the kernel widens; all else is converted first
            let widens = dtype == DType::F32 && new.dtype().is_half();
            sources.push(if widens { new.clone() } else { new.to_dtype(dtype)? });
        }
        let mut locks: Vec<_> = pairs.iter().map(|(target, _)| target.lock()).collect();
        let mut many = Many::new(OP, device);
        for (i, (lock, new)) in locks.iter_mut().zip(&sources).enumerate() {
            let target = lock.on_gpu(OP)?;
            if target.dtype().is_float() {
                many.push(target, Some(new), &[], None, i)?;
            } else {
                elementwise::copy(OP, new, target)?;
            }
        }
        many.launch(|tensors, n, stream| unsafe { sys::smalti_average(tensors, n, at, decay, stream) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Params;

    #[test]
    fn averages_and_swapping() -> Result<()> {
        let params = Params::new();
        let w = params.param("w", Tensor::from_slice(&[1f32, 2.], [2])?)?;
        let n = params.buffer("n", Tensor::from_slice(&[0i64], ())?)?;
        let h = params.param("h", Tensor::ones([2], DType::BF16)?)?;
        let mut ema = Ema::new(&params.all(), 0.75, false)?;
        w.set(&Tensor::from_slice(&[5f32, -2.], [2])?)?;
        n.set(&Tensor::from_slice(&[7i64], ())?)?;
        ema.update()?;
        let seen = ema.with_average(|| {
            assert_eq!(h.value().dtype(), DType::BF16);
            w.value().to_vec::<f32>()
        })?;
        assert_eq!((seen, w.value().to_vec::<f32>()?), (vec![2.0, 1.0], vec![5.0, -2.0]));
        assert_eq!(ema.averages()[1].1.item()?, 7.0);
        assert!(ema.with_average(|| Err::<(), _>(crate::Error::msg("no"))).is_err());
        assert_eq!(w.value().to_vec::<f32>()?, [5.0, -2.0]);
        let (mut saved, updates) = (ema.averages(), ema.updates());
        saved.reverse();
        let mut other = Ema::new(&params.all(), 0.75, true)?;
        other.load(&saved, updates)?;
        assert_eq!(other.averages()[0].1.to_vec::<f32>()?, [2.0, 1.0]);
        assert!(other.load(&saved[1..], 3).is_err());
        Ok(())
    }
}
