//! Collectives: what ranks that train one model together tell each other.
//!
//! A rank is one of `world` equal workers, each with a part of the batch. A loss takes a [`Comm`]; [`single`] is the
//! world of one, [`threads`] runs ranks as threads of this process. Every rank must call the same collectives in the
//! same order, with tensors of the same shape and dtype; sums are taken in the order of ranks, so that all ranks get
//! the same bits.

mod threads;

pub use threads::threads;

use crate::{
    Gradients, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure,
};
use smallvec::smallvec;
use std::{fmt::Debug, sync::Arc};

/// A rank's connection to the others.
pub type Comm = Arc<dyn Communicator>;

/// What a way of connecting ranks has to provide. Tensors come and go untracked; gradients are this module's matter.
pub trait Communicator: Send + Sync + Debug {
    /// Number of this rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn world(&self) -> usize;

    /// Begins a collective; it goes on while the caller does other things.
    ///
    /// # Errors
    /// If the connection is broken.
    fn start(&self, what: Collective, tensor: &Tensor) -> Result<Box<dyn Pending>>;
}

/// What is done with the ranks' tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// All of them, one after the other along the first axis, in the order of ranks.
    Gather,
    /// Their sum.
    Sum,
    /// That of one rank.
    Broadcast {
        /// Which rank's.
        root: usize,
    },
}

/// A collective under way.
pub trait Pending: Send {
    /// Waits for its result.
    ///
    /// # Errors
    /// If another rank failed, or came with another collective, shape or dtype.
    fn wait(self: Box<Self>) -> Result<Tensor>;
}

/// The world of one rank.
pub fn single() -> Comm {
    Arc::new(Single)
}

#[derive(Debug)]
struct Single;

impl Communicator for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn start(&self, _: Collective, tensor: &Tensor) -> Result<Box<dyn Pending>> {
        Ok(Box::new(Done(tensor.clone())))
    }
}

struct Done(Tensor);

impl Pending for Done {
    fn wait(self: Box<Self>) -> Result<Tensor> {
        Ok(self.0)
    }
}

/// Waits until every rank has come here.
///
/// # Errors
/// If another rank failed.
pub fn barrier(comm: &Comm) -> Result<()> {
    let token = Tensor::from_slice(&[0i64], [1])?;
    comm.start(Collective::Sum, &token)?.wait().map(drop)
}

impl Tensor {
    /// The tensors `[n, ..]` of all ranks as `[world * n, ..]`, in the order of ranks. The gradient of a rank's own
    /// rows is the sum of what all ranks' losses say of them: with a mean of the losses over ranks behind it, the
    /// gradient of the loss over the whole batch (open_clip's `gather_with_grad`).
    ///
    /// # Errors
    /// If it is a scalar, another rank has another shape, or failed.
    #[track_caller]
    pub fn all_gather(&self, comm: &Comm) -> Result<Tensor> {
        ensure!(self.rank() > 0, "all_gather", "needs rows to put after one another, got a scalar");
        if comm.world() == 1 {
            return Ok(self.clone());
        }
        let all = comm.start(Collective::Gather, &self.detach().contiguous()?)?.wait()?;
        all.record([self], AllGather { comm: comm.clone(), rows: self.shape()[0] })
    }

    /// The sum over ranks. Its gradient is the sum of the ranks' gradients.
    ///
    /// # Errors
    /// If another rank has another shape, or failed.
    #[track_caller]
    pub fn all_reduce(&self, comm: &Comm) -> Result<Tensor> {
        if comm.world() == 1 {
            return Ok(self.clone());
        }
        let sum = comm.start(Collective::Sum, &self.detach().contiguous()?)?.wait()?;
        sum.record([self], AllReduce { comm: comm.clone() })
    }

    /// The tensor of rank `root`, on every rank; untracked.
    ///
    /// # Errors
    /// If there is no such rank, another rank has another shape, or failed.
    #[track_caller]
    pub fn broadcast_from(&self, root: usize, comm: &Comm) -> Result<Tensor> {
        let world = comm.world();
        ensure!(root < world, "broadcast_from", "there is no rank {root} among {world}");
        comm.start(Collective::Broadcast { root }, &self.detach().contiguous()?)?.wait()
    }
}

impl Tensor {
    /// [`backward`](Tensor::backward) of this rank's loss, with gradients averaged over ranks. Each gradient sets out
    /// as soon as it is complete, while the backward goes on. The ranks' losses must come from the same computation.
    ///
    /// # Errors
    /// As `backward`; if another rank failed or has other parameters.
    #[track_caller]
    pub fn backward_averaged(&self, comm: &Comm) -> Result<Gradients> {
        if comm.world() == 1 {
            return self.backward();
        }
        let mut under_way = Vec::new();
        self.backward_each(&mut |id, grad| {
            under_way.push((id, comm.start(Collective::Sum, &grad.contiguous()?)?));
            Ok(())
        })?;
        let share = 1.0 / comm.world() as f64;
        let wait = |(id, sum): (u64, Box<dyn Pending>)| Ok((id, sum.wait()?.mul_scalar(share)?));
        Ok(Gradients::from_ids(under_way.into_iter().map(wait).collect::<Result<_>>()?))
    }
}

struct AllGather {
    comm: Comm,
    rows: usize,
}

impl Backward for AllGather {
    const NAME: &'static str = "all_gather";

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let sum = self.comm.start(Collective::Sum, &grad.contiguous()?)?.wait()?;
        Ok(smallvec![Some(sum.narrow(0, self.comm.rank() * self.rows, self.rows)?)])
    }
}

struct AllReduce {
    comm: Comm,
}

impl Backward for AllReduce {
    const NAME: &'static str = "all_reduce";

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(self.comm.start(Collective::Sum, &grad.contiguous()?)?.wait()?)])
    }
}
