//! The token shuffling of masked autoencoders (He et al., CVPR 2022, section 3; facebookresearch/mae): which
//! patches stay, gathering them, and putting mask tokens in the place of the others. Each pass touches a token
//! once, and positions are added on the way.

use super::gather::checked;
use crate::{
    Result, Rng, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_float, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// Random masking from this `noise` [N, L]: per sample, the `keep` patches of the smallest noise stay.
    ///
    /// Returns `ids_keep` [N, keep] (in order of their noise), `ids_restore` [N, L] (the place of each patch in
    /// that order) and `mask` [N, L] (f32; 1 = removed), all in the notation of the paper's code.
    ///
    /// # Errors
    /// If the shape is not [N, L] or `keep` is larger than L.
    #[track_caller]
    pub fn random_masking_ids(&self, keep: usize) -> Result<(Tensor, Tensor, Tensor)> {
        let [_, l] = self.dims("random_masking_ids")?;
        ensure!(keep <= l, "random_masking_ids", "cannot keep {keep} of {l} patches");
        on_device!(self, "random_masking_ids", cpu::ids(self, keep), gpu::ids(self, keep))
    }

    /// A random masking of `n` samples of `len` patches, as [`random_masking_ids`](Self::random_masking_ids) gives it
    /// for [`rand`](Self::rand) noise [n, len] of the same generator. On a GPU the noise is never stored.
    ///
    /// # Errors
    /// If `keep` is larger than `len`.
    #[track_caller]
    pub fn random_masking(
        n: usize,
        len: usize,
        keep: usize,
        rng: &mut Rng,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        ensure!(keep <= len, "random_masking", "cannot keep {keep} of {len} patches");
        #[cfg(gpu)]
        if let (crate::Device::Cuda(index), false, true) =
            (crate::Device::current()?, crate::device::is_on_host(), len <= gpu::LONGEST)
        {
            return gpu::random(index, [n, len, keep], rng);
        }
        Tensor::rand([n, len], rng)?.random_masking_ids(keep)
    }

    /// Tokens `ids` [N, K] of `self` [N, L, D], as [N, K, D].
    ///
    /// # Errors
    /// If shapes do not match or an id lies outside `0..L`.
    #[track_caller]
    pub fn gather_tokens(&self, ids: &Tensor) -> Result<Tensor> {
        let ids = check_ids("gather_tokens", self, ids)?;
        let y = on_device!(
            self,
            "gather_tokens",
            for_float!(self.dtype(), "gather_tokens", T => cpu::gather::<T>(self, None, &ids)),
            gpu::gather(self, None, &ids, "gather_tokens")
        )?;
        y.record([self], GatherTokens { ids, len: self.shape()[1] })
    }

    /// Tokens `ids` [N, K] of `self` [N, L, D], plus their rows of `pos` [L, D]: [N, K, D].
    ///
    /// # Errors
    /// If shapes or dtypes do not match or an id lies outside `0..L`.
    #[track_caller]
    pub fn gather_tokens_add(&self, pos: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let op = "gather_tokens_add";
        let ids = check_ids(op, self, ids)?;
        ensure!(
            pos.shape() == &self.shape()[1..] && pos.dtype() == self.dtype(),
            op,
            "pos is {} {:?}, the tokens {} {:?} need {:?}",
            pos.dtype(),
            pos.shape(),
            self.dtype(),
            self.shape(),
            &self.shape()[1..]
        );
        let y = on_device!(
            self,
            op,
            for_float!(self.dtype(), op, T => cpu::gather::<T>(self, Some(pos), &ids)),
            gpu::gather(self, Some(pos), &ids, op)
        )?;
        y.record([self, pos], GatherTokensAdd { ids, len: self.shape()[1] })
    }

    /// The transpose of [`gather_tokens`](Self::gather_tokens): tokens `self` [N, K, D] go to rows `ids` of
    /// [N, len, D], the others are 0. Tokens of a repeated id add up.
    ///
    /// # Errors
    /// If shapes do not match or an id lies outside `0..len`.
    #[track_caller]
    pub fn ungather_tokens(&self, ids: &Tensor, len: usize) -> Result<Tensor> {
        let op = "ungather_tokens";
        let [n, k, _] = self.dims(op)?;
        ensure!(
            ids.shape() == [n, k],
            op,
            "ids {:?} do not belong to tokens {:?}",
            ids.shape(),
            self.shape()
        );
        let ids = checked(op, ids, 1, len)?.contiguous()?;
        let y = on_device!(
            self,
            op,
            match cpu::places(&ids, len) {
                Some(places) => for_float!(self.dtype(), op, T => cpu::ungather::<T>(self, &places, len)),
                None => self.add_tokens(&ids, len),
            },
            // each row looks through all ids, which is quick for few of them
            if k <= 1024 { gpu::ungather(self, &ids, len) } else { self.add_tokens(&ids, len) }
        )?;
        y.record([self], UngatherTokens { ids })
    }

    /// [`ungather_tokens`](Self::ungather_tokens) as an addition to zeros.
    fn add_tokens(&self, ids: &Tensor, len: usize) -> Result<Tensor> {
        let [n, k, d] = self.dims("ungather_tokens")?;
        let index = ids.unsqueeze(2)?.expand([n, k, d])?;
        let zeros = self.device().scope(|| Tensor::zeros([n, len, d], self.dtype()))?;
        zeros.scatter_add(1, &index, &self.detach())
    }

    /// The decoder's input of a masked autoencoder, in one pass: `self` [N, 1 + K, D] are the class token and
    /// the kept tokens; row 1 + i of the result is kept token `ids_restore[i]`, or `mask_token` `[D]` if that is
    /// K or more; `pos` [1 + L, D] is added. Returns [N, 1 + L, D].
    ///
    /// # Errors
    /// If shapes or dtypes do not match, or a row of `ids_restore` [N, L] is not a permutation of `0..L`.
    #[track_caller]
    pub fn unshuffle(&self, mask_token: &Tensor, ids_restore: &Tensor, pos: &Tensor) -> Result<Tensor> {
        let op = Unshuffle::NAME;
        let [n, rows, d] = self.dims(op)?;
        let [batch, l] = ids_restore.dims(op)?;
        ensure!(
            batch == n && rows >= 1 && rows <= l + 1,
            op,
            "tokens {:?} do not belong to ids_restore {:?}: need [N, 1 + K, D] and [N, L] with K <= L",
            self.shape(),
            ids_restore.shape()
        );
        ensure!(
            mask_token.shape() == [d] && pos.shape() == [l + 1, d],
            op,
            "mask token {:?} and positions {:?} must be [{d}] and [{}, {d}]",
            mask_token.shape(),
            pos.shape(),
            l + 1
        );
        let dtype = self.dtype();
        ensure!(
            mask_token.dtype() == dtype && pos.dtype() == dtype,
            op,
            "tokens are {dtype}, the mask token {}, positions {}",
            mask_token.dtype(),
            pos.dtype()
        );
        let ids = on_device!(
            ids_restore,
            op,
            cpu::permutations(op, ids_restore, l),
            gpu::permutations(op, ids_restore, l)
        )?;
        let y = on_device!(
            self,
            op,
            for_float!(dtype, op, T => cpu::unshuffle::<T>(self, mask_token, &ids, pos)),
            gpu::unshuffle(self, mask_token, &ids, pos)
        )?;
        y.record([self, mask_token, pos], Unshuffle { ids, keep: rows - 1 })
    }
}

#[track_caller]
fn check_ids(op: &'static str, x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ([n, l, _], [batch, _]) = (x.dims(op)?, ids.dims(op)?);
    ensure!(n == batch, op, "ids {:?} do not belong to tokens {:?}", ids.shape(), x.shape());
    checked(op, ids, 1, l)?.contiguous()
}

struct GatherTokens {
    ids: Tensor,
    len: usize,
}
impl Backward for GatherTokens {
    const NAME: &'static str = "gather_tokens";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.ungather_tokens(&self.ids, self.len)?)])
    }
}

struct GatherTokensAdd {
    ids: Tensor,
    len: usize,
}
impl Backward for GatherTokensAdd {
    const NAME: &'static str = "gather_tokens_add";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let [n, k, d] = grad.dims(Self::NAME)?;
        Ok(smallvec![
            ctx.grad(0, || grad.ungather_tokens(&self.ids, self.len))?,
            ctx.grad(1, || on_device!(
                grad,
                Self::NAME,
                {
                    let zeros = grad.device().scope(|| Tensor::zeros([self.len, d], grad.dtype()))?;
                    zeros.index_add(0, &self.ids.reshape([n * k])?, &grad.reshape([n * k, d])?, 1.0)
                },
                gpu::gather_pos_backward(grad, &self.ids, self.len)
            ))?
        ])
    }
}

struct UngatherTokens {
    ids: Tensor,
}
impl Backward for UngatherTokens {
    const NAME: &'static str = "ungather_tokens";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.gather_tokens(&self.ids)?)])
    }
}

struct Unshuffle {
    ids: Tensor,
    keep: usize,
}
impl Backward for Unshuffle {
    const NAME: &'static str = "unshuffle";
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let needs = [0, 1, 2].map(|i| ctx.needs(i));
        let (tokens, mask, pos) = on_device!(
            grad,
            Self::NAME,
            for_float!(grad.dtype(), Self::NAME, T => {
                let (tokens, mask) = cpu::unshuffle_backward::<T>(&grad.contiguous()?, &self.ids, self.keep, needs);
                Ok((tokens, mask, ctx.grad(2, || grad.sum(0))?))
            }),
            gpu::unshuffle_backward(grad, &self.ids, self.keep, needs)
        )?;
        Ok(smallvec![tokens, mask, pos])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{
            parallel::{SharedMut, for_ranges, for_rows},
            pool::CpuVec,
            simd::simd_of,
        },
        dtype::{Float, Real},
    };

    pub fn ids(noise: &Tensor, keep: usize) -> Result<(Tensor, Tensor, Tensor)> {
        let shuffle = noise.argsort(1, false)?.contiguous()?;
        let (restore, mask) = invert(&shuffle, keep);
        Ok((shuffle.narrow(1, 0, keep)?.contiguous()?, restore, mask))
    }

    /// `ids` as i64, the rows of which are permutations of 0..len.
    #[track_caller]
    pub fn permutations(op: &'static str, ids: &Tensor, len: usize) -> Result<Tensor> {
        let ids = checked(op, ids, 1, len)?.contiguous()?;
        ensure!(
            places(&ids, len).is_some(),
            op,
            "a row of ids_restore {:?} is not a permutation of 0..{len}",
            ids.shape()
        );
        Ok(ids)
    }

    /// Inverse permutations of the rows of `shuffle`, and the mask of what stands at `keep` and behind.
    fn invert(shuffle: &Tensor, keep: usize) -> (Tensor, Tensor) {
        let width = shuffle.shape()[1];
        let mut restore = CpuVec::<i64>::new(shuffle.numel());
        let mut mask = CpuVec::<f32>::new(shuffle.numel());
        let rows = shuffle.cpu_slice::<i64>().chunks(width.max(1));
        let targets = restore.chunks_mut(width.max(1)).zip(mask.chunks_mut(width.max(1)));
        for (row, (restore, mask)) in rows.zip(targets) {
            for (place, &patch) in row.iter().enumerate() {
                restore[patch as usize] = place as i64;
                mask[patch as usize] = f32::from(u8::from(place >= keep));
            }
        }
        let shape = shuffle.shape();
        (
            Tensor::from_cpu(restore, shape, "random_masking_ids"),
            Tensor::from_cpu(mask, shape, "random_masking_ids"),
        )
    }

    /// For each sample and row 0..len the position in `ids` [N, K] that names it, or -1; `None` if an id
    /// repeats.
    pub fn places(ids: &Tensor, len: usize) -> Option<Vec<i64>> {
        let (n, k) = (ids.shape()[0], ids.shape()[1]);
        let ids = ids.cpu_slice::<i64>();
        let mut places = vec![-1; n * len];
        for sample in 0..n {
            let row = &mut places[sample * len..(sample + 1) * len];
            for (place, &id) in ids[sample * k..(sample + 1) * k].iter().enumerate() {
                if std::mem::replace(&mut row[id as usize], place as i64) >= 0 {
                    return None;
                }
            }
        }
        Some(places)
    }

    /// to = a + b
    #[inline(always)]
    fn sum_row<T: Float>(to: &mut [T], a: &[T], b: &[T]) {
        simd_of::<T, _>(
            #[inline(always)]
            || {
                for i in 0..to.len().min(a.len()).min(b.len()) {
                    to[i] = T::store(a[i].acc() + b[i].acc());
                }
            },
        )
    }

    pub fn gather<T: Float>(x: &Tensor, pos: Option<&Tensor>, ids: &Tensor) -> Result<Tensor> {
        let (x, pos) = (x.contiguous()?, pos.map(Tensor::contiguous).transpose()?);
        let ([n, l, d], k) = ([x.shape()[0], x.shape()[1], x.shape()[2]], ids.shape()[1]);
        let (x, ids) = (x.cpu_slice::<T>(), ids.cpu_slice::<i64>());
        let pos = pos.as_ref().map(Tensor::cpu_slice::<T>);
        let mut out = CpuVec::<T>::new(n * k * d);
        let target = SharedMut::new(&mut out);
        for_rows(n * k, d, |rows| {
            for row in rows {
                let id = ids[row] as usize;
                let from = &x[(row / k * l + id) * d..][..d];
                let to = unsafe { target.slice(row * d..(row + 1) * d) };
                match pos {
                    Some(pos) => sum_row(to, from, &pos[id * d..][..d]),
                    None => to.copy_from_slice(from),
                }
            }
        });
        Ok(Tensor::from_cpu(out, [n, k, d], "gather_tokens"))
    }

    pub fn ungather<T: Float>(x: &Tensor, places: &[i64], len: usize) -> Result<Tensor> {
        let x = x.contiguous()?;
        let [n, k, d] = [x.shape()[0], x.shape()[1], x.shape()[2]];
        let x = x.cpu_slice::<T>();
        let mut out = CpuVec::<T>::new(n * len * d);
        let target = SharedMut::new(&mut out);
        for_rows(n * len, d, |rows| {
            for row in rows {
                let to = unsafe { target.slice(row * d..(row + 1) * d) };
                match places[row] {
                    -1 => to.fill(T::default()),
                    place => to.copy_from_slice(&x[(row / len * k + place as usize) * d..][..d]),
                }
            }
        });
        Ok(Tensor::from_cpu(out, [n, len, d], "ungather_tokens"))
    }

    pub fn unshuffle<T: Float>(
        x: &Tensor,
        mask_token: &Tensor,
        ids: &Tensor,
        pos: &Tensor,
    ) -> Result<Tensor> {
        let (x, mask_token, pos) = (x.contiguous()?, mask_token.contiguous()?, pos.contiguous()?);
        let [n, tokens, d] = [x.shape()[0], x.shape()[1], x.shape()[2]];
        let length = pos.shape()[0];
        let (x, mask_token) = (x.cpu_slice::<T>(), mask_token.cpu_slice::<T>());
        let (ids, pos) = (ids.cpu_slice::<i64>(), pos.cpu_slice::<T>());
        let mut out = CpuVec::<T>::new(n * length * d);
        let target = SharedMut::new(&mut out);
        for_rows(n * length, d, |rows| {
            for row in rows {
                let (sample, i) = (row / length, row % length);
                let token = if i == 0 { 0 } else { 1 + ids[sample * (length - 1) + i - 1] as usize };
                let from = if token < tokens { &x[(sample * tokens + token) * d..][..d] } else { mask_token };
                let to = unsafe { target.slice(row * d..(row + 1) * d) };
                sum_row(to, from, &pos[i * d..][..d]);
            }
        });
        Ok(Tensor::from_cpu(out, [n, length, d], "unshuffle"))
    }

    /// Gradients of tokens and mask token. Every token takes one row of `g`; the mask token's rows are summed
    /// per sample, then over samples, so the order of the sum is fixed.
    pub fn unshuffle_backward<T: Float>(
        g: &Tensor,
        ids: &Tensor,
        keep: usize,
        [want_tokens, want_mask, _]: [bool; 3],
    ) -> (Option<Tensor>, Option<Tensor>) {
        let [n, length, d] = [g.shape()[0], g.shape()[1], g.shape()[2]];
        let (g, ids) = (g.cpu_slice::<T>(), ids.cpu_slice::<i64>());
        let mut tokens = CpuVec::<T>::new(if want_tokens { n * (1 + keep) * d } else { 0 });
        let mut sums = vec![T::Acc::ZERO; if want_mask { n * d } else { 0 }];
        let (target, partial) = (SharedMut::new(&mut tokens), SharedMut::new(&mut sums));
        for_ranges(n, 1, |samples| {
            for sample in samples {
                let g = &g[sample * length * d..(sample + 1) * length * d];
                let put = |token: usize, from: &[T]| {
                    if want_tokens {
                        let start = (sample * (1 + keep) + token) * d;
                        unsafe { target.slice(start..start + d) }.copy_from_slice(from);
                    }
                };
                put(0, &g[..d]);
                for (i, &id) in ids[sample * (length - 1)..(sample + 1) * (length - 1)].iter().enumerate() {
                    let from = &g[(1 + i) * d..(2 + i) * d];
                    if (id as usize) < keep {
                        put(1 + id as usize, from);
                    } else if want_mask {
                        let sum = unsafe { partial.slice(sample * d..(sample + 1) * d) };
                        simd_of::<T, _>(
                            #[inline(always)]
                            || sum.iter_mut().zip(from).for_each(|(s, &v)| *s += v.acc()),
                        );
                    }
                }
            }
        });
        let tokens = want_tokens.then(|| Tensor::from_cpu(tokens, [n, 1 + keep, d], "unshuffle"));
        let mask = want_mask.then(|| {
            let mut total = vec![T::Acc::ZERO; d];
            for sample in sums.chunks(d.max(1)) {
                total.iter_mut().zip(sample).for_each(|(t, &s)| *t += s);
            }
            let mut out = CpuVec::<T>::new(d);
            out.iter_mut().zip(total).for_each(|(o, t)| *o = T::store(t));
            Tensor::from_cpu(out, [d], "unshuffle")
        });
        (tokens, mask)
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::{
        DType,
        gpu::{self, Known, sys},
    };

    /// The longest row that is sorted in the registers of a warp.
    pub const LONGEST: usize = 1024;

    /// Fresh ids_keep, ids_restore and mask.
    struct Results([Tensor; 3]);

    impl Results {
        fn new(index: usize, [n, len, keep]: [usize; 3]) -> Result<Results> {
            let empty = |shape: [usize; 2], dtype| gpu::empty_on(index, &shape, dtype, "random_masking_ids");
            Ok(Results([
                empty([n, keep], DType::I64)?,
                empty([n, len], DType::I64)?,
                empty([n, len], DType::F32)?,
            ]))
        }

        /// They are filled: what is known of them without a look.
        fn done(self) -> (Tensor, Tensor, Tensor) {
            let Results([keep, restore, mask]) = self;
            let (len, kept) = (restore.shape()[1], keep.shape()[1]);
            let below = Some(len as i64);
            gpu::know(&keep, Known { below, permutations: kept == len, ..Known::default() });
            gpu::know(&restore, Known { below, permutations: true, ..Known::default() });
            gpu::know(&mask, Known { positive: kept < len && mask.numel() > 0, ..Known::default() });
            (keep, restore, mask)
        }
    }

    pub fn ids(noise: &Tensor, keep: usize) -> Result<(Tensor, Tensor, Tensor)> {
        let op = "random_masking_ids";
        let [n, len] = noise.dims(op)?;
        let crate::Device::Cuda(index) = noise.device() else { return cpu::ids(noise, keep) };
        let results = Results::new(index, [n, len, keep])?;
        let [k, r, m] = &results.0;
        if len <= LONGEST && noise.dtype().is_float() {
            gpu::launch(op, [noise, k, r, m], |[noise, k, r, m], stream| unsafe {
                sys::smalti_masking_ids(&noise, &k, &r, &m, stream)
            })?;
        } else {
            let shuffle = noise.argsort(1, false)?.contiguous()?;
            gpu::launch(op, [&shuffle, k, r, m], |[shuffle, k, r, m], stream| unsafe {
                sys::smalti_masking_invert(&shuffle, &k, &r, &m, stream)
            })?;
        }
        Ok(results.done())
    }

    pub fn random(index: usize, sizes: [usize; 3], rng: &mut Rng) -> Result<(Tensor, Tensor, Tensor)> {
        let block = rng.reserve((sizes[0] * sizes[1]) as u64) / 4;
        let [seed, philox_stream, _] = rng.state();
        let results = Results::new(index, sizes)?;
        let [k, r, m] = &results.0;
        gpu::launch("random_masking", [k, r, m], |[k, r, m], stream| unsafe {
            sys::smalti_masking_random(seed, philox_stream, block, &k, &r, &m, stream)
        })?;
        Ok(results.done())
    }

    /// As on the CPU. Waits for the device, unless a kernel of this crate made the ids.
    #[track_caller]
    pub fn permutations(op: &'static str, ids: &Tensor, len: usize) -> Result<Tensor> {
        if gpu::are_permutations(ids) {
            return Ok(ids.detach());
        }
        let ids = checked(op, ids, 1, len)?.contiguous()?;
        let flag = gpu::empty(&ids, &[1], DType::I32, op)?;
        gpu::launch(op, [&ids, &flag], |[ids, flag], stream| unsafe {
            sys::smalti_masking_check(&ids, flag.ptr.cast(), stream)
        })?;
        ensure!(
            flag.item()? == 0.0,
            op,
            "a row of ids_restore {:?} is not a permutation of 0..{len}",
            ids.shape()
        );
        Ok(ids)
    }

    /// With dense rows, as the kernels need tokens; other steps are theirs.
    fn rows(x: &Tensor) -> Result<Tensor> {
        if x.shape()[2] <= 1 || x.strides()[2] == 1 { Ok(x.detach()) } else { x.detach().contiguous() }
    }

    pub fn gather(x: &Tensor, pos: Option<&Tensor>, ids: &Tensor, op: &'static str) -> Result<Tensor> {
        let ([n, k], x) = (ids.dims(op)?, rows(x)?);
        let pos = pos.map(|pos| pos.detach().contiguous()).transpose()?;
        let y = gpu::empty(&x, &[n, k, x.shape()[2]], x.dtype(), op)?;
        gpu::launch(op, [&x, pos.as_ref().unwrap_or(&x), ids, &y], |[x, p, ids, y], stream| {
            let p = if pos.is_some() { &raw const p } else { std::ptr::null() };
            unsafe { sys::smalti_gather_tokens(&x, p, &ids, &y, stream) }
        })?;
        Ok(y)
    }

    pub fn ungather(x: &Tensor, ids: &Tensor, len: usize) -> Result<Tensor> {
        let (op, x) = (UngatherTokens::NAME, rows(x)?);
        let y = gpu::empty(&x, &[x.shape()[0], len, x.shape()[2]], x.dtype(), op)?;
        gpu::launch(op, [&x, ids, &y], |[x, ids, y], stream| unsafe {
            sys::smalti_ungather_tokens(&x, &ids, &y, stream)
        })?;
        Ok(y)
    }

    pub fn gather_pos_backward(grad: &Tensor, ids: &Tensor, len: usize) -> Result<Tensor> {
        let (op, g) = (GatherTokensAdd::NAME, rows(grad)?);
        let ([n, _, d], dtype) = (g.dims(op)?, g.dtype());
        let bytes =
            unsafe { sys::smalti_gather_tokens_pos_workspace(n as i64, len as i64, d as i64, dtype as i32) };
        let (work, dpos) =
            (gpu::empty(&g, &[bytes as usize], DType::U8, op)?, gpu::empty(&g, &[len, d], dtype, op)?);
        gpu::launch(op, [&g, ids, &dpos, &work], |[g, ids, dpos, work], stream| unsafe {
            sys::smalti_gather_tokens_pos_backward(&g, &ids, &dpos, work.ptr, stream)
        })?;
        Ok(dpos)
    }

    pub fn unshuffle(x: &Tensor, mask_token: &Tensor, ids: &Tensor, pos: &Tensor) -> Result<Tensor> {
        let (op, x) = (Unshuffle::NAME, rows(x)?);
        let (token, pos) = (mask_token.detach().contiguous()?, pos.detach().contiguous()?);
        let y = gpu::empty(&x, &[x.shape()[0], pos.shape()[0], x.shape()[2]], x.dtype(), op)?;
        gpu::launch(op, [&x, &token, ids, &pos, &y], |[x, token, ids, pos, y], stream| unsafe {
            sys::smalti_unshuffle_forward(&x, &token, &ids, &pos, &y, stream)
        })?;
        Ok(y)
    }

    type Three = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

    /// Gradients of tokens, mask token and positions, as far as `needs` says, in one reading of `grad`.
    pub fn unshuffle_backward(grad: &Tensor, ids: &Tensor, keep: usize, needs: [bool; 3]) -> Result<Three> {
        let (op, g) = (Unshuffle::NAME, rows(grad)?);
        let ([n, length, d], dtype) = (g.dims(op)?, g.dtype());
        let bytes = unsafe {
            let (mask, pos) = (needs[1].into(), needs[2].into());
            sys::smalti_unshuffle_workspace(n as i64, length as i64, d as i64, dtype as i32, mask, pos)
        };
        let work = gpu::empty(&g, &[bytes as usize], DType::U8, op)?;
        let make = |i: usize, shape: &[usize]| needs[i].then(|| gpu::empty(&g, shape, dtype, op)).transpose();
        let results = (make(0, &[n, 1 + keep, d])?, make(1, &[d])?, make(2, &[length, d])?);
        let or = |t: &Option<Tensor>| t.clone().unwrap_or_else(|| g.clone());
        let (a, b, c) = (or(&results.0), or(&results.1), or(&results.2));
        gpu::launch(op, [&g, ids, &work, &a, &b, &c], |[g, ids, work, a, b, c], stream| {
            let at = |i: usize, view| if needs[i] { view } else { std::ptr::null() };
            let (a, b, c) = (at(0, &raw const a), at(1, &raw const b), at(2, &raw const c));
            unsafe { sys::smalti_unshuffle_backward(&g, &ids, keep as i64, a, b, c, work.ptr, stream) }
        })?;
        Ok(results)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, gradcheck};

    fn random<const N: usize>(shape: [usize; N], seed: u64) -> Result<Tensor> {
        Tensor::randn(shape, &mut Rng::new(seed))?.to_dtype(DType::F64)
    }

    #[test]
    fn ids_are_inverse_permutations() -> Result<()> {
        let noise = Tensor::from_slice(&[0.3f32, 0.1, 0.2, 0.5, 0.5, 0.0], [2, 3])?;
        let (keep, restore, mask) = noise.random_masking_ids(2)?;
        assert_eq!(keep.to_vec::<i64>()?, [1, 2, 2, 0]);
        assert_eq!(restore.to_vec::<i64>()?, [2, 0, 1, 1, 2, 0]);
        assert_eq!(mask.to_vec::<f32>()?, [1., 0., 0., 0., 1., 0.]);
        assert!(noise.random_masking_ids(4).is_err() && Tensor::scalar(1.).random_masking_ids(0).is_err());
        assert_eq!(noise.random_masking_ids(0)?.0.shape(), [2, 0]);
        Ok(())
    }

    #[test]
    fn drawn_masks_are_those_of_drawn_noise() -> Result<()> {
        for (n, len, keep) in [(3, 196, 49), (2, 10, 10), (1, 1500, 4), (2, 7, 0)] {
            let (mut a, mut b) = (Rng::new(5).stream(3), Rng::new(5).stream(3));
            assert_eq!(a.next_u32(), b.next_u32());
            let (k, r, m) = Tensor::random_masking(n, len, keep, &mut a)?;
            let (k2, r2, m2) = Tensor::rand([n, len], &mut b)?.random_masking_ids(keep)?;
            assert_eq!((k.to_vec::<i64>()?, r.to_vec::<i64>()?), (k2.to_vec::<i64>()?, r2.to_vec::<i64>()?));
            assert_eq!((m.to_vec::<f32>()?, a.state()), (m2.to_vec::<f32>()?, b.state()));
        }
        assert!(Tensor::random_masking(1, 3, 4, &mut Rng::new(1)).is_err());
        Ok(())
    }

    #[test]
    fn bad_ids_are_errors() -> Result<()> {
        let x = random([2, 3, 4], 1)?;
        assert!(x.gather_tokens(&Tensor::from_slice(&[0i64, 3], [2, 1])?).is_err());
        assert!(x.gather_tokens(&Tensor::zeros([1, 2], DType::I64)?).is_err());
        let (token, pos) = (random([4], 2)?, random([4, 4], 3)?);
        let twice = Tensor::from_slice(&[0i64, 1, 1, 0, 1, 2], [2, 3])?;
        assert!(x.unshuffle(&token, &twice, &pos).is_err_and(|e| e.to_string().contains("permutation")));
        assert!(x.unshuffle(&token, &twice, &random([3, 4], 3)?).is_err());
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = random([2, 3, 5], 1)?.permute([0, 2, 1])?;
        let (pos, token) = (random([5, 3], 2)?, random([3], 3)?);
        let (keep, restore, _) = random([2, 5], 4)?.random_masking_ids(2)?;
        let repeated = Tensor::from_slice(&[4i64, 4, 0, 1], [2, 2])?;
        for ids in [&keep, &repeated] {
            gradcheck(|t| t[0].gather_tokens(ids), std::slice::from_ref(&x))?;
            gradcheck(|t| t[0].gather_tokens_add(&t[1], ids), &[x.clone(), pos.clone()])?;
            gradcheck(|t| t[0].ungather_tokens(ids, 6), &[random([2, 2, 3], 5)?])?;
        }
        let decoder_pos = random([6, 3], 6)?;
        let f = |t: &[Tensor]| t[0].unshuffle(&t[1], &restore, &t[2]);
        gradcheck(f, &[x.narrow(1, 1, 3)?, token.clone(), decoder_pos.clone()])?;
        let none = random([2, 1, 3], 7)?;
        gradcheck(f, &[none, token.clone(), decoder_pos.clone()])?;
        gradcheck(f, &[random([2, 6, 3], 8)?, token, decoder_pos])
    }

    #[test]
    fn half_precision() -> Result<()> {
        let (keep, restore, _) = random([2, 5], 4)?.random_masking_ids(2)?;
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let x = Tensor::ones([2, 5, 4], dtype)?;
            let kept = x.gather_tokens_add(&Tensor::ones([5, 4], dtype)?, &keep)?;
            assert_eq!(kept.to_dtype(DType::F64)?.to_vec::<f64>()?, [2.0; 16]);
            let tokens = Tensor::cat(&[&kept.narrow(1, 0, 1)?, &kept], 1)?;
            let y = tokens.unshuffle(&Tensor::ones([4], dtype)?, &restore, &Tensor::zeros([6, 4], dtype)?)?;
            assert_eq!((y.dtype(), y.sum(())?.item()?), (dtype, 4.0 * 2.0 * (3.0 * 2.0 + 3.0)));
        }
        Ok(())
    }
}
