//! Ranks as threads of one process: for tests, and small runs on a CPU.

use super::{Collective, Comm, Communicator, Pending};
use crate::{DType, Device, Error, Result, Tensor, ensure};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

/// Runs `f` once a rank, each on a thread of its own with its share of the present pool's threads (at least one), and
/// gives the results in the order of ranks.
///
/// # Errors
/// If `world` is 0 or threads cannot be made; the error of the first rank that failed, in which case the others'
/// collectives fail too.
///
/// # Panics
/// If `f` does.
pub fn threads<R: Send>(world: usize, f: impl Fn(Comm) -> Result<R> + Sync) -> Result<Vec<R>> {
    ensure!(world > 0, "threads", "needs at least one rank");
    let meeting = Arc::new(Meeting { world, state: Mutex::default(), arrived: Condvar::new() });
    let (device, share) = (Device::current()?, (rayon::current_num_threads() / world).max(1));
    let run = |rank: usize| -> Result<R> {
        let _leaving = Leaving { meeting: &meeting, rank };
        let comm: Comm = Arc::new(Threads { rank, calls: AtomicU64::new(0), meeting: meeting.clone() });
        let pool = rayon::ThreadPoolBuilder::new().num_threads(share).build();
        let pool = pool.map_err(|e| Error::msg(format!("threads: {e}")))?;
        let result = pool.install(|| device.scope(|| f(comm)));
        if let Err(error) = &result {
            meeting.fail(rank, &error.to_string());
        }
        result
    };
    let mut results: Vec<Result<R>> = thread::scope(|scope| {
        let run = &run;
        let ranks: Vec<_> = (0..world).map(|rank| scope.spawn(move || run(rank))).collect();
        let join = |rank: thread::ScopedJoinHandle<Result<R>>| rank.join();
        ranks
            .into_iter()
            .map(join)
            .map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    // the others failed because of the first
    let first = meeting.lock().failed.as_ref().map(|(rank, _)| *rank);
    if let Some(rank) = first
        && let Err(error) = results.swap_remove(rank)
    {
        return Err(error);
    }
    results.into_iter().collect()
}

/// One rank.
struct Threads {
    rank: usize,
    /// Collectives that it has begun: its next one's number.
    calls: AtomicU64,
    meeting: Arc<Meeting>,
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "rank {} of {} threads", self.rank, self.meeting.world)
    }
}

/// Where ranks meet: collectives under way by number.
struct Meeting {
    world: usize,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    calls: BTreeMap<u64, Call>,
    /// The first rank that failed, and why.
    failed: Option<(usize, String)>,
}

struct Call {
    what: Collective,
    parts: Vec<Option<Tensor>>,
    /// There once every rank has come.
    result: Option<std::result::Result<Tensor, String>>,
    /// Ranks that have the result.
    taken: usize,
}

impl Meeting {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, rank: usize, why: &str) {
        self.lock().failed.get_or_insert_with(|| (rank, why.to_owned()));
        self.arrived.notify_all();
    }
}

/// A rank that panics must not leave the others waiting.
struct Leaving<'a> {
    meeting: &'a Meeting,
    rank: usize,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.meeting.fail(self.rank, "panic");
        }
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.meeting.world
    }

    /// The last rank to come computes the result; the others' work goes on meanwhile.
    fn start(&self, what: Collective, tensor: &Tensor) -> Result<Box<dyn Pending>> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let world = self.meeting.world;
        let parts = {
            let mut state = self.meeting.lock();
            let call = state.calls.entry(number).or_insert_with(|| Call {
                what,
                parts: vec![None; world],
                result: None,
                taken: 0,
            });
            if call.what != what {
                call.result =
                    Some(Err(format!("rank {} came to {what:?}, another to {:?}", self.rank, call.what)));
            }
            call.parts[self.rank] = Some(tensor.clone());
            let all = call.parts.iter().all(Option::is_some);
            (all && call.result.is_none()).then(|| std::mem::take(&mut call.parts))
        };
        if let Some(parts) = parts {
            let parts: Vec<Tensor> = parts.into_iter().flatten().collect();
            let result = crate::no_grad(|| combine(what, &parts)).map_err(|e| e.to_string());
            if let Some(call) = self.meeting.lock().calls.get_mut(&number) {
                call.result = Some(result);
            }
        }
        self.meeting.arrived.notify_all();
        Ok(Box::new(Waiting { number, meeting: self.meeting.clone() }))
    }
}

/// A collective that the other ranks may still have to come to.
struct Waiting {
    number: u64,
    meeting: Arc<Meeting>,
}

impl Pending for Waiting {
    fn wait(self: Box<Self>) -> Result<Tensor> {
        let mut state = self.meeting.lock();
        loop {
            if let Some(result) = state.calls.get(&self.number).and_then(|call| call.result.clone()) {
                if let Some(call) = state.calls.get_mut(&self.number) {
                    call.taken += 1;
                    if call.taken == self.meeting.world {
                        state.calls.remove(&self.number);
                    }
                }
                return result.map_err(Error::msg);
            }
            if let Some((rank, why)) = &state.failed {
                return Err(Error::msg(format!("rank {rank} failed: {why}")));
            }
            state = self.meeting.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The ranks' tensors, in their order.
fn combine(what: Collective, parts: &[Tensor]) -> Result<Tensor> {
    let like: (&[usize], DType) = (parts[0].shape(), parts[0].dtype());
    if let Some((rank, t)) = parts.iter().enumerate().find(|(_, t)| (t.shape(), t.dtype()) != like) {
        return Err(Error::msg(format!(
            "{what:?}: rank 0 came with {} {:?}, rank {rank} with {} {:?}",
            like.1,
            like.0,
            t.dtype(),
            t.shape()
        )));
    }
    match what {
        Collective::Gather => Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0),
        Collective::Sum => parts[1..].iter().try_fold(parts[0].clone(), |sum, t| sum.add(t)),
        Collective::Broadcast { root } => Ok(parts[root].clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Rng, checkpoint,
        comm::{barrier, single},
        nn::{Linear, Params},
    };

    fn rows(rank: usize) -> Result<Tensor> {
        Tensor::from_slice(&[rank as f32, 10.0 + rank as f32], [1, 2])
    }

    #[test]
    fn values_and_gradients_of_three_ranks() -> Result<()> {
        let results = threads(3, |comm| {
            let x = rows(comm.rank())?.requires_grad();
            let all = x.all_gather(&comm)?;
            // each rank weighs the gathered rows by its own number + 1
            let weight = comm.rank() as f64 + 1.0;
            let gathered = all.mul(&all)?.sum(())?.mul_scalar(weight)?.backward()?;
            let sum = x.all_reduce(&comm)?;
            let reduced = sum.mul(&sum)?.sum(())?.backward()?;
            let root = x.broadcast_from(2, &comm)?;
            barrier(&comm)?;
            let of = |g: &crate::Gradients| g.get(&x).map(|g| g.to_vec::<f32>()).transpose();
            Ok((
                all.to_vec::<f32>()?,
                of(&gathered)?,
                sum.to_vec::<f32>()?,
                of(&reduced)?,
                root.to_vec::<f32>()?,
            ))
        })?;
        for (rank, (all, gathered, sum, reduced, root)) in results.into_iter().enumerate() {
            let x = [rank as f32, 10.0 + rank as f32];
            assert_eq!(all, [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]);
            // the weights of the three losses add up to 6
            assert_eq!(gathered, Some(x.map(|v| 6.0 * 2.0 * v).to_vec()));
            assert_eq!(sum, [3.0, 33.0]);
            assert_eq!(reduced, Some(vec![3.0 * 2.0 * 3.0, 3.0 * 2.0 * 33.0]));
            assert_eq!(root, [2.0, 12.0]);
        }
        Ok(())
    }

    /// Two ranks with half a batch each get the gradients of the whole; a checkpoint in the graph changes nothing.
    #[test]
    fn gradients_averaged_during_the_backward() -> Result<()> {
        let images = Tensor::randn([4, 3], &mut Rng::new(1))?;
        let gradients = |rows: &Tensor, hidden: bool, comm: &Comm| -> Result<Vec<Vec<f32>>> {
            let (params, mut rng) = (Params::new(), Rng::new(2));
            let first = Linear::new(&params.sub("a"), 3, 3, true, &mut rng)?;
            let second = Linear::new(&params.sub("b"), 3, 3, true, &mut rng)?;
            // `first` is used twice: its gradient is complete only behind the second use
            let middle = first.forward(rows)?.tanh()?;
            let y = if hidden {
                let (first, second) = (first.clone(), second.clone());
                checkpoint(move |t| second.forward(&first.forward(&t[0])?), &[&middle])?
            } else {
                second.forward(&first.forward(&middle)?)?
            };
            let grads = y.mul(&y)?.mean(())?.backward_averaged(comm)?;
            params.trained().iter().filter_map(|p| grads.get(p)).map(Tensor::to_vec).collect()
        };
        for hidden in [false, true] {
            let whole = gradients(&images, hidden, &single())?;
            let halves = threads(2, |comm| gradients(&images.narrow(0, comm.rank() * 2, 2)?, hidden, &comm))?;
            assert_eq!((whole.len(), &halves[0]), (4, &halves[1]));
            for (a, b) in whole.concat().iter().zip(halves[0].concat()) {
                assert!((a - b).abs() < 1e-6, "{a} {b}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_rank_that_fails_or_differs_ends_all() {
        let failed = threads(2, |comm| {
            if comm.rank() == 1 {
                return Err(Error::msg("no images"));
            }
            barrier(&comm)
        });
        assert_eq!(failed.unwrap_err().to_string(), "no images");
        let differs = threads(2, |comm| Tensor::ones([comm.rank() + 1], DType::F32)?.all_reduce(&comm));
        let message = differs.unwrap_err().to_string();
        assert!(message.contains("rank 0 came with f32 [1], rank 1 with f32 [2]"), "{message}");
        let other = threads(2, |comm| {
            let x = Tensor::ones([1], DType::F32)?;
            if comm.rank() == 0 { x.all_reduce(&comm) } else { x.all_gather(&comm) }
        });
        assert!(other.unwrap_err().to_string().contains("another to"));
        assert!(threads(0, |_| Ok(())).is_err());
        let caught = std::panic::catch_unwind(|| {
            threads(2, |comm| if comm.rank() == 0 { panic!("rank 0") } else { barrier(&comm) })
        });
        assert!(caught.is_err());
    }

    #[test]
    fn one_rank_alone() -> Result<()> {
        let x = rows(3)?;
        let comm = single();
        assert_eq!((comm.rank(), comm.world()), (0, 1));
        assert_eq!(x.all_gather(&comm)?.all_reduce(&comm)?.to_vec::<f32>()?, x.to_vec::<f32>()?);
        assert!(x.broadcast_from(1, &comm).is_err());
        Ok(())
    }
}
