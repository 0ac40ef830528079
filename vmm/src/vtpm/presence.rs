// SPDX-License-Identifier: Apache-2.0
//! The guest's physical-presence requests on their way to the service.
//!
//! A thread makes the calls, so that a service that hangs holds a vCPU only briefly. What the guest is told
//! holds: a request that it was told has failed is not carried out at the next start, so one that is stored
//! after all is taken back, and one that the service has not got yet does not reach it any more.

use std::io;
use std::sync::Arc;
use std::sync::Weak;
use std::sync::mpsc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use devices::tpm_ppi;
use devices::tpm_ppi::Submit;
use vtpm_svc::control::client::ClientError;

use crate::threads::spawn;

/// Takes an answer, and says whether anybody still waits for it.
pub(super) type Hears<'a> = &'a mut dyn FnMut(Result<u32, ClientError>) -> bool;

/// A request, and the vCPU that waits for its outcome for as long as `waits` can be had.
struct Order {
    operation: u32,
    argument: u32,
    waits: Weak<()>,
    answer: SyncSender<u32>,
}

/// What the device calls. `submit` stores a request, and takes it back if its answer is not heard.
pub(super) fn submitter(
    patience: Duration,
    submit: impl Fn(u32, u32, Hears<'_>) + Send + 'static,
) -> io::Result<Submit> {
    let (wanted, orders) = mpsc::sync_channel::<Order>(1);
    spawn("tpm-ppi".into(), move || {
        for Order { operation, argument, waits, answer } in orders {
            if waits.strong_count() == 0 {
                continue;
            }
            submit(operation, argument, &mut |outcome| {
                let outcome = match outcome {
                    Ok(outcome) => outcome,
                    Err(ClientError::Refused { .. }) => tpm_ppi::NOT_IMPLEMENTED,
                    Err(_) => tpm_ppi::FAILURE,
                };
                // Without room in the channel the answer is either taken or not: there is no answer that lies
                // there unheard.
                answer.send(outcome).is_ok()
            });
        }
    })
    .map_err(|e| e.0)?;
    Ok(Box::new(move |operation, argument| {
        let waiting = Arc::new(());
        let (answer, outcome) = mpsc::sync_channel(0);
        let order = Order { operation, argument, waits: Arc::downgrade(&waiting), answer };
        match wanted.try_send(order) {
            Ok(()) => outcome.recv_timeout(patience).unwrap_or(tpm_ppi::FAILURE),
            Err(_) => tpm_ppi::FAILURE,
        }
    }))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Mutex;
    use std::thread;

    use rustix::net::RecvFlags;
    use vtpm_svc::control::client::Client;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(300);

    /// What the service was asked for.
    type Asked = Arc<Mutex<Vec<(u32, u32)>>>;

    /// A service that keeps a request (pending, argument) and takes `delay` to answer; its words are those of
    /// the control protocol.
    fn service(delay: Duration) -> (Client, Asked) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let stored = Arc::new(Mutex::new(vec![(0, 0)]));
        let its = Arc::clone(&stored);
        thread::spawn(move || {
            let word = |stream: &mut UnixStream| {
                let mut word = [0; 4];
                stream.read_exact(&mut word).map(|()| u32::from_be_bytes(word))
            };
            // SET_DATAFD, without its descriptor, which nothing here needs.
            let mut first = [0; 4];
            rustix::net::recv(&theirs, &mut first, RecvFlags::empty()).unwrap();
            theirs.write_all(&[0; 4]).unwrap();
            while let Ok(command) = word(&mut theirs) {
                let (pending, argument) = *its.lock().unwrap().last().unwrap();
                let answer = match command {
                    1 => vec![0, 0x1_ffff],
                    0x4356_4d01 => vec![0, pending, argument, 0, 0],
                    0x4356_4d02 => {
                        let request = (word(&mut theirs).unwrap(), word(&mut theirs).unwrap());
                        thread::sleep(delay);
                        its.lock().unwrap().push(request);
                        vec![0, 0]
                    }
                    other => panic!("command {other:#x}"),
                };
                let bytes: Vec<u8> = answer.into_iter().flat_map(u32::to_be_bytes).collect();
                theirs.write_all(&bytes).unwrap();
            }
        });
        (Client::over(ours, "test").unwrap(), stored)
    }

    fn submit(client: &Client) -> Submit {
        let control = client.control();
        submitter(PATIENCE, move |operation, argument, hears| {
            control.submit_ppi_for(operation, argument, hears).unwrap();
        })
        .unwrap()
    }

    #[test]
    fn a_request_that_was_called_failed_is_not_left_in_place() {
        let (client, stored) = service(2 * PATIENCE);
        stored.lock().unwrap().push((23, 2));
        let submit = submit(&client);
        assert_eq!(submit(5, 0), tpm_ppi::FAILURE);
        // A second one comes while the first is still being stored: nobody waits for it when its turn comes.
        assert_eq!(submit(14, 0), tpm_ppi::FAILURE);
        thread::sleep(8 * PATIENCE);
        assert_eq!(*stored.lock().unwrap(), [(0, 0), (23, 2), (5, 0), (23, 2)]);
    }

    #[test]
    fn a_request_that_is_stored_in_time_stays() {
        let (client, stored) = service(Duration::ZERO);
        let submit = submit(&client);
        assert_eq!(submit(5, 0), 0);
        thread::sleep(PATIENCE);
        assert_eq!(*stored.lock().unwrap(), [(0, 0), (5, 0)]);
    }
}
