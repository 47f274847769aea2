//! Services as sockets see them.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use orlop_node::dataplane::{EbpfDataplane, ServiceChanges};

use crate::stage::{BACKEND_PORT, Stage, ask, cluster_ip, mapped, pod, run, serve, service, upsert, vip, whole};

fn started(stage: &Stage) -> EbpfDataplane {
    EbpfDataplane::start(stage.config.clone()).expect("start the dataplane")
}

fn udp(bind: &str) -> UdpSocket {
    let socket = UdpSocket::bind(bind).expect("bind");
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    socket
}

#[test]
fn tcp_reaches_all_ready_backends_and_shows_the_cluster_ip() {
    run(
        "sockets::tcp_reaches_all_ready_backends_and_shows_the_cluster_ip",
        |stage| {
            let dataplane = started(stage);
            (1..=4).for_each(serve);
            upsert(&dataplane, &[service(1, &[(1, 1), (2, 1), (3, 1), (4, 2)])]);
            for address in [vip(1), mapped(vip(1))] {
                let answers: BTreeSet<u8> = (0..100).map(|_| ask(address).expect("an answer")).collect();
                assert_eq!(answers, BTreeSet::from([1, 2, 3]), "{address}");
                let stream = TcpStream::connect(address).expect("connect");
                assert_eq!(stream.peer_addr().expect("a peer"), address);
            }
            // A pod's own address, and what is no service, are as they were.
            let direct = TcpStream::connect((pod(2), BACKEND_PORT)).expect("connect");
            assert_eq!(
                direct.peer_addr().expect("a peer"),
                SocketAddr::from((pod(2), BACKEND_PORT))
            );
            let elsewhere = TcpStream::connect_timeout(&SocketAddr::from((cluster_ip(1), 81)), Duration::from_secs(1));
            assert!(elsewhere.is_err());
            let v6 = TcpStream::connect((Ipv6Addr::LOCALHOST, 1)).expect_err("nobody is there");
            assert_eq!(v6.kind(), ErrorKind::ConnectionRefused);
        },
    );
}

#[test]
fn without_a_ready_backend_terminating_ones_serve_then_it_is_refused() {
    run(
        "sockets::without_a_ready_backend_terminating_ones_serve_then_it_is_refused",
        |stage| {
            let dataplane = started(stage);
            (1..=2).for_each(serve);
            upsert(&dataplane, &[service(1, &[(1, 2), (2, 2)])]);
            let answers: BTreeSet<u8> = (0..50).map(|_| ask(vip(1)).expect("an answer")).collect();
            assert_eq!(answers, BTreeSet::from([1, 2]));

            upsert(&dataplane, &[service(1, &[])]);
            for address in [vip(1), mapped(vip(1))] {
                let start = Instant::now();
                let error = ask(address).expect_err("nobody is there");
                assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{address}");
                assert!(start.elapsed() < Duration::from_secs(1), "at once");
                let socket = udp(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
                let error = socket.send_to(b"x", address).expect_err("nobody is there");
                assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{address}");
                let error = socket.connect(address).expect_err("nobody is there");
                assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{address}");
            }

            upsert(&dataplane, &[service(1, &[(1, 1)])]);
            assert_eq!(ask(vip(1)).expect("back again"), 1);
            let counters = dataplane.read_counters_now().expect("counters");
            let of_service = &counters.services[&("default".to_owned(), "s1".to_owned())];
            assert_eq!((of_service.connections, of_service.refused), (51, 6));
            assert_eq!(
                of_service
                    .backends
                    .iter()
                    .map(|backend| backend.connections)
                    .sum::<u64>(),
                1 + tcp_of_one(&counters)
            );
        },
    );
}

/// Of the fifty connections to terminating backends, those that went to the one that is still there.
fn tcp_of_one(counters: &orlop_node::dataplane::Counters) -> u64 {
    let of_service = &counters.services[&("default".to_owned(), "s1".to_owned())];
    let tcp = of_service
        .backends
        .iter()
        .find(|backend| backend.protocol == 6)
        .expect("a TCP backend");
    assert_eq!(tcp.address, SocketAddr::from((pod(1), BACKEND_PORT)));
    // The backend was gone from the service for a moment: it counts from its return.
    tcp.connections - 1
}

#[test]
fn connected_udp_keeps_one_backend_and_shows_the_cluster_ip() {
    run(
        "sockets::connected_udp_keeps_one_backend_and_shows_the_cluster_ip",
        |stage| {
            let dataplane = started(stage);
            (1..=3).for_each(serve);
            upsert(&dataplane, &[service(1, &[(1, 1), (2, 1), (3, 1)])]);
            let mut reached = BTreeSet::new();
            for (bind, address) in [("0.0.0.0:0", vip(1)), ("[::]:0", mapped(vip(1)))] {
                for _ in 0..40 {
                    let socket = udp(bind);
                    socket.connect(address).expect("connect");
                    assert_eq!(socket.peer_addr().expect("a peer"), address);
                    let mut answers = BTreeSet::new();
                    for _ in 0..3 {
                        socket.send(b"x").expect("send");
                        let mut byte = [0];
                        let (_, from) = socket.recv_from(&mut byte).expect("an answer");
                        assert_eq!(from, address, "the answer comes from the ClusterIP");
                        answers.insert(byte[0]);
                    }
                    assert_eq!(answers.len(), 1, "one backend a connection");
                    reached.extend(answers);
                }
            }
            assert_eq!(reached, BTreeSet::from([1, 2, 3]));
        },
    );
}

#[test]
fn unconnected_udp_keeps_its_backend_while_that_is_ready() {
    run(
        "sockets::unconnected_udp_keeps_its_backend_while_that_is_ready",
        |stage| {
            let dataplane = started(stage);
            (1..=5).for_each(serve);
            upsert(
                &dataplane,
                &[service(1, &[(1, 1), (2, 1), (3, 1)]), service(2, &[(4, 1), (5, 1)])],
            );
            for (bind, of) in [
                ("0.0.0.0:0", identity as fn(SocketAddr) -> SocketAddr),
                ("[::]:0", mapped),
            ] {
                let socket = udp(bind);
                let exchange = |to: SocketAddr| {
                    socket.send_to(b"x", to).expect("send");
                    let mut byte = [0];
                    let (_, from) = socket.recv_from(&mut byte).expect("an answer");
                    assert_eq!(from, to, "the answer comes from where it was sent to");
                    byte[0]
                };
                let first = exchange(of(vip(1)));
                let second = exchange(of(vip(2)));
                for _ in 0..20 {
                    assert_eq!(exchange(of(vip(1))), first);
                    assert_eq!(exchange(of(vip(2))), second);
                }
                // Others come and go: it stays. Its own goes: another one.
                let others: Vec<(u8, u8)> = (1..=3).filter(|pod| *pod != first).map(|pod| (pod, 1)).collect();
                let mut more = others.clone();
                more.push((first, 1));
                upsert(&dataplane, &[service(1, &more[1..])]);
                assert_eq!(exchange(of(vip(1))), first);
                upsert(&dataplane, &[service(1, &others)]);
                let moved = exchange(of(vip(1)));
                assert_ne!(moved, first);
                let mut terminating = others.clone();
                terminating
                    .iter_mut()
                    .filter(|(pod, _)| *pod == moved)
                    .for_each(|backend| backend.1 = 2);
                upsert(&dataplane, &[service(1, &terminating)]);
                assert_ne!(
                    exchange(of(vip(1))),
                    moved,
                    "a terminating backend is left for a ready one"
                );
                // What it says to a backend directly is answered by that backend.
                let direct = of(SocketAddr::from((pod(second), BACKEND_PORT)));
                assert_eq!(exchange(direct), second);
                assert!([4, 5].contains(&exchange(of(vip(2)))));
                upsert(&dataplane, &[service(1, &[(1, 1), (2, 1), (3, 1)])]);
            }
        },
    );
}

fn identity(address: SocketAddr) -> SocketAddr {
    address
}

#[test]
fn one_udp_socket_talks_to_more_services_than_it_remembers() {
    run(
        "sockets::one_udp_socket_talks_to_more_services_than_it_remembers",
        |stage| {
            let dataplane = started(stage);
            (1..=12).for_each(serve);
            let services: Vec<_> = (1..=12).map(|number| service(number, &[(number, 1)])).collect();
            upsert(&dataplane, &services);
            let socket = udp("0.0.0.0:0");
            for number in (1..=12).chain(1..=12) {
                socket.send_to(b"x", vip(number)).expect("send");
                let mut byte = [0];
                let (_, from) = socket.recv_from(&mut byte).expect("an answer");
                assert_eq!((from, byte[0]), (vip(number), number));
            }
        },
    );
}

#[test]
fn a_socket_that_goes_elsewhere_forgets_the_service() {
    run("sockets::a_socket_that_goes_elsewhere_forgets_the_service", |stage| {
        let dataplane = started(stage);
        serve(1);
        upsert(&dataplane, &[service(1, &[(1, 1)])]);
        let socket = udp("0.0.0.0:0");
        socket.connect(vip(1)).expect("connect");
        assert_eq!(socket.peer_addr().expect("a peer"), vip(1));
        let direct = SocketAddr::from((pod(1), BACKEND_PORT));
        socket.connect(direct).expect("connect");
        assert_eq!(socket.peer_addr().expect("a peer"), direct);
    });
}

/// The cheap place for what a socket was told holds 32 here; others go to the socket's own storage. Closed ones are forgotten.
#[test]
fn more_connections_than_the_map_holds() {
    run("sockets::more_connections_than_the_map_holds", |stage| {
        let dataplane = started(stage);
        serve(1);
        upsert(&dataplane, &[service(1, &[(1, 1)])]);
        for address in [vip(1), mapped(vip(1))] {
            let streams: Vec<_> = (0..80).map(|_| TcpStream::connect(address).expect("connect")).collect();
            assert!(
                streams
                    .iter()
                    .all(|stream| stream.peer_addr().expect("a peer") == address)
            );
        }
        whole(&dataplane, &[]);
        crate::lifecycle::assert_empty(&dataplane);
    });
}

#[test]
fn open_connections_outlive_their_service() {
    run("sockets::open_connections_outlive_their_service", |stage| {
        let dataplane = started(stage);
        serve(1);
        upsert(&dataplane, &[service(1, &[(1, 1)])]);
        let mut stream = TcpStream::connect(vip(1)).expect("connect");
        whole(&dataplane, &[]);
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("the greeting");
        stream.write_all(b"x").expect("write");
        stream.read_exact(&mut byte).expect("an answer");
        assert_eq!(stream.peer_addr().expect("a peer"), vip(1));
        assert!(TcpStream::connect_timeout(&vip(1), Duration::from_millis(300)).is_err());
    });
}

/// Two services change their backends as fast as they can, others come and go, while clients connect: nobody is refused, and
/// nobody is answered by a backend of the other service.
#[test]
fn flips_under_load_lead_nobody_astray() {
    run("sockets::flips_under_load_lead_nobody_astray", |stage| {
        let dataplane = started(stage);
        (1..=8).for_each(serve);
        upsert(
            &dataplane,
            &[service(1, &[(1, 1), (2, 1)]), service(2, &[(5, 1), (6, 1)])],
        );
        let end = Arc::new(AtomicBool::new(false));
        let asked = Arc::new(AtomicU64::new(0));
        let clients: Vec<_> = [(1, 1..=4_u8), (2, 5..=8_u8)]
            .into_iter()
            .flat_map(|(number, allowed)| [(number, allowed.clone(), false), (number, allowed, true)])
            .map(|(number, allowed, v6)| {
                let (end, asked) = (Arc::clone(&end), Arc::clone(&asked));
                thread::spawn(move || {
                    let address = if v6 { mapped(vip(number)) } else { vip(number) };
                    let socket = udp(if v6 { "[::]:0" } else { "0.0.0.0:0" });
                    while !end.load(Ordering::Relaxed) {
                        let answer = ask(address).expect("an answer");
                        assert!(
                            allowed.contains(&answer),
                            "service {number} was answered by pod {answer}"
                        );
                        socket.send_to(b"x", address).expect("send");
                        let mut byte = [0];
                        socket.recv_from(&mut byte).expect("an answer");
                        assert!(
                            allowed.contains(&byte[0]),
                            "service {number} was answered by pod {}",
                            byte[0]
                        );
                        asked.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let start = Instant::now();
        let mut flips = 0_u64;
        while start.elapsed() < Duration::from_secs(3) || asked.load(Ordering::Relaxed) < 500 {
            assert!(start.elapsed() < Duration::from_secs(30), "the clients are stuck");
            flips += 1;
            let step = u8::try_from(flips % 3).expect("small");
            upsert(
                &dataplane,
                &[
                    service(1, &[(1 + step, 1), (2 + step, 1)]),
                    service(2, &[(5 + step, 1)]),
                ],
            );
            // Elements of the hash map are recycled all the time.
            upsert(&dataplane, &[service(20 + step, &[(7, 1), (8, 1)])]);
            let removal = ("default".to_owned(), format!("s{}", 20 + step));
            dataplane
                .apply_now(&ServiceChanges {
                    removals: vec![removal],
                    ..Default::default()
                })
                .expect("remove a service");
        }
        end.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().expect("a client");
        }
        println!("{flips} flips, {} exchanges", asked.load(Ordering::Relaxed));
        let failures = crate::lifecycle::failures(&dataplane);
        assert_eq!(failures, (0, 0), "lookups given up, sockets without storage");
        whole(&dataplane, &[]);
        crate::lifecycle::assert_empty(&dataplane);
    });
}
