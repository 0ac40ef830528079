// SPDX-License-Identifier: Apache-2.0
//! The server: one TPM, and one thread per client.
//!
//! Clients are not trusted: messages are bounded before they are read, the number of clients is limited, and
//! a client that misbehaves loses its connection and nothing else.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;

use super::answers::answer;
use super::clients::Clients;
use super::clients::MAX_CLIENTS;
use super::clients::Seat;
use super::conversation::converse;
use super::data;
use super::data::Received;
use super::socket::Listener;
use super::socket::Stream;
use super::wire::Request;
use super::wire::Response;
use super::wire::code;
use crate::log;
use crate::tpm::Tpm;
use crate::vmgs::block::BlockFile;

/// Why the service ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A control client asked for it.
    Shutdown,
    /// The client is gone and `terminate` was asked for.
    ClientGone,
    /// A signal.
    Signal,
}

/// A TPM, and everything else that the threads share.
pub struct Server<F> {
    tpm: Tpm<F>,
    /// The service ends when the control client, or the last of several, is gone.
    terminate: bool,
    control_clients: AtomicUsize,
    data_fd_in_use: AtomicBool,
    end: Sender<End>,
}

/// A listening socket and what is done with its clients.
struct Acceptor<F> {
    listener: Listener,
    name: &'static str,
    serve: fn(&Arc<Server<F>>, Stream, &Seat),
    clients: Arc<Clients>,
}

impl<F> Acceptor<F> {
    fn new(listener: Listener, name: &'static str, serve: fn(&Arc<Server<F>>, Stream, &Seat)) -> Arc<Self> {
        Arc::new(Self { listener, name, serve, clients: Arc::default() })
    }
}

impl<F: BlockFile + 'static> Server<F> {
    /// Serves `tpm`, and says to `end` when that is over; `terminate` asks for it when the control client, or
    /// the last of several, is gone.
    pub fn new(tpm: Tpm<F>, terminate: bool, end: Sender<End>) -> Self {
        let (control_clients, data_fd_in_use) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { tpm, terminate, control_clients, data_fd_in_use, end }
    }

    /// The TPM that is served.
    pub fn tpm(&self) -> &Tpm<F> {
        &self.tpm
    }

    fn finish(&self, why: End) {
        // The receiver is gone only when the service is ending anyway.
        let _ = self.end.send(why);
    }

    /// Serves data clients, the first of them on this thread: a client that is waiting already is answered
    /// without a change of threads. Returns when that client is gone; others are then served by other
    /// threads.
    pub fn serve_data_here(self: &Arc<Self>, listener: Listener) {
        self.accept_loop(Acceptor::new(listener, "data", |server, stream, seat| {
            server.data_client(stream, Some(seat));
        }));
    }

    /// Serves control clients until the process ends.
    pub fn serve_control(self: &Arc<Self>, listener: Listener) {
        self.spawn("control", move |server| {
            server.accept_loop(Acceptor::new(listener, "control", |server, stream, seat| {
                server.control_client(stream, Some(seat));
            }));
        });
    }

    /// Serves one data client that is connected already.
    pub fn serve_data_stream(self: &Arc<Self>, stream: Stream) {
        self.spawn("data", move |server| server.data_client(stream, None));
    }

    /// Serves one control client that is connected already.
    pub fn serve_control_stream(self: &Arc<Self>, stream: Stream) {
        self.spawn("control", move |server| server.control_client(stream, None));
    }

    /// Whether there is a thread for it now.
    fn spawn(self: &Arc<Self>, name: &str, run: impl FnOnce(&Arc<Self>) + Send + 'static) -> bool {
        let server = self.clone();
        let spawned = std::thread::Builder::new().name(name.into()).spawn(move || run(&server));
        if let Err(e) = &spawned {
            log::error(&format!("no thread for a {name} client: {e}"));
        }
        spawned.is_ok()
    }

    /// Waits for a client, leaves the next one to a new thread, and serves this one.
    fn accept_loop(self: &Arc<Self>, acceptor: Arc<Acceptor<F>>) {
        let Acceptor { listener, name, serve, clients } = &*acceptor;
        loop {
            let stream = match listener.accept() {
                Ok(stream) => stream,
                Err(e) => {
                    log::often(&format!("accepting a {name} client: {e}"));
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    continue;
                }
            };
            // One thread at a time takes places: the one that accepts.
            let seat = match clients.admit(&stream) {
                Ok(Some(seat)) => seat,
                Ok(None) => {
                    log::often(&format!(
                        "more than {MAX_CLIENTS} {name} clients are at work; one was turned away"
                    ));
                    continue;
                }
                Err(e) => {
                    log::often(&format!("taking a {name} client: {e}"));
                    continue;
                }
            };
            let next = acceptor.clone();
            let relieved = self.spawn(name, move |server| server.accept_loop(next));
            if relieved {
                return serve(self, stream, &seat);
            }
        }
    }

    fn data_client(self: &Arc<Self>, mut stream: Stream, seat: Option<&Seat>) {
        let Ok(incoming) = stream.try_clone() else { return };
        // A command usually comes in one piece, and is then read with one system call.
        let mut incoming = std::io::BufReader::with_capacity(data::MAX_COMMAND, incoming);
        loop {
            let received = data::receive(&mut incoming);
            if let Some(seat) = seat {
                seat.busy();
            }
            let (reply, last) = match received {
                Ok(Received::Command(incoming)) => {
                    let response = match self.tpm.execute(incoming.prefix, &incoming.command) {
                        Ok(r) if (data::HEADER..=data::MAX_COMMAND).contains(&r.len()) => r,
                        Ok(_) | Err(_) => data::failure(),
                    };
                    (data::encode(&response, incoming.prefix.is_some()), false)
                }
                Ok(Received::BadLength) => (data::bad_length(), true),
                Ok(Received::End) | Err(_) => return,
            };
            // Before the answer is sent: a client that does not take it is idle.
            if let Some(seat) = seat {
                seat.answered();
            }
            if stream.write_all(&reply).is_err() {
                return;
            }
            if last {
                return stream.take_leave();
            }
        }
    }

    fn control_client(self: &Arc<Self>, mut stream: Stream, seat: Option<&Seat>) {
        self.control_clients.fetch_add(1, Ordering::SeqCst);
        let shutdown = converse(&mut stream, seat, |request, fd| match request {
            Request::SetDataFd => self.take_data_fd(fd),
            request => answer(&self.tpm, request),
        });
        let last = self.control_clients.fetch_sub(1, Ordering::SeqCst) == 1;
        if shutdown {
            self.finish(End::Shutdown);
        } else if last && self.terminate {
            // One of several that goes away is no reason.
            self.finish(End::ClientGone);
        }
    }

    fn take_data_fd(self: &Arc<Self>, fd: Option<std::os::fd::OwnedFd>) -> Response {
        let Some(fd) = fd else { return Response::refused(code::BAD_PARAMETER) };
        if self.data_fd_in_use.swap(true, Ordering::SeqCst) {
            return Response::refused(code::IO);
        }
        let stream = match Stream::handed_over(fd) {
            Ok(stream) => stream,
            Err(e) => {
                log::error(&format!("the data socket that a client handed over: {e}"));
                self.data_fd_in_use.store(false, Ordering::SeqCst);
                return Response::refused(code::IO);
            }
        };
        let spawned = self.spawn("data", move |server| {
            server.data_client(stream, None);
            server.data_fd_in_use.store(false, Ordering::SeqCst);
        });
        if spawned {
            return Response::ok();
        }
        self.data_fd_in_use.store(false, Ordering::SeqCst);
        Response::refused(code::IO)
    }
}
