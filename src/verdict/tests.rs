//! Verdicts by table: what the tunnel shows, what the legs show, what follows. Times are in milliseconds around [`END`].

use super::*;
use crate::close::Cause;
use crate::evidence::{Event, Kind};
use crate::tunnel::live::{GapRecord, SentRecord};
use Segment::{Dispatch, Edge, Internal, LastMile, Serve, Unknown};

/// Nobody is at fault.
const NOBODY: Segment = Segment::None;

/// When every drop of these tests ended.
const END: Millis = 1_800_000_000_000;

fn rules() -> Rules {
    Rules::default()
}

/// A tunnel of an hour with a heartbeat every five seconds, which ended like that.
fn ended(by: Ender, how: How, code: Option<u16>) -> Record {
    let sent = SentRecord {
        bytes: 10_000,
        messages: 720,
        longest_silence_ms: 5000,
        silence_ms: 2000,
        mid_frame: false,
        untaken_ms: None,
    };
    let time = std::time::UNIX_EPOCH + Duration::from_millis(END as u64);
    Record {
        time: humantime::format_rfc3339_millis(time).to_string(),
        key: "key".into(),
        user: "alice".into(),
        os_user: "alice".into(),
        port: 3773,
        ip: "203.0.113.1".into(),
        chain: vec!["203.0.113.1".into()],
        id: "id".into(),
        dur_ms: 3_600_000,
        cause: Cause::DownstreamClosed,
        ended_by: Some(by),
        how: Some(how),
        code,
        opened: true,
        client: sent.clone(),
        instance: sent,
        unanswered_ms: None,
        unheard_ms: 2000,
        gap: None,
        hang: None,
        ws_gap_seconds: None,
        verdict: None,
    }
}

fn cut() -> Record {
    ended(Ender::Client, How::Fin, None)
}

fn silent(for_ms: u64) -> Record {
    Record {
        unheard_ms: for_ms,
        ..ended(Ender::Client, How::Timeout, None)
    }
}

fn closed(code: u16) -> Record {
    ended(Ender::Client, How::Close, Some(code))
}

fn trouble(kind: Kind, from: Millis, until: Option<Millis>) -> Trouble {
    Trouble {
        earliest: END + from,
        latest: END + from + if kind == Kind::Stall { 2000 } else { 0 },
        until: until.map(|until| END + until),
        kind,
        what: "was in trouble".into(),
    }
}

/// A leg that has been connected for an hour.
fn leg(name: &str, stalls: Vec<Trouble>, end: Option<Millis>) -> Leg {
    let mut conn = Conn::of(name, END - 3_600_000);
    conn.heard = END + end.unwrap_or(30_000);
    conn.stalls = stalls;
    conn.spoke = Some(conn.heard);
    conn.end = end.map(|at| trouble(Kind::Cut, at, None));
    let mut conns = vec![conn];
    if let Some(at) = end {
        let mut next = Conn::of(name, END + at + 3000);
        next.heard = END + 30_000;
        conns.push(next);
    }
    Leg {
        name: name.into(),
        conns,
        stood: vec![],
    }
}

fn well(name: &str) -> Leg {
    leg(name, vec![], None)
}

fn broken(name: &str) -> Leg {
    leg(name, vec![], Some(100))
}

fn stalled(name: &str, from: Millis) -> Leg {
    leg(
        name,
        vec![trouble(Kind::Stall, from, Some(from + 25_000))],
        None,
    )
}

fn around(edge: Leg, internal: Leg) -> Around {
    Around {
        edge,
        internal,
        instance: InstanceHistory {
            well: Some(END + 100),
            troubles: vec![],
        },
        now: END + 30_000,
        ..Around::default()
    }
}

fn clean() -> Around {
    around(well("cloudflare"), well("internal"))
}

fn witness(user: &str, heard: Millis, ended: Option<Millis>) -> (String, Witness) {
    let witness = Witness {
        ip: format!("203.0.113.{}", user.len()),
        opened: END - 1_000_000,
        heard: END + heard,
        gap: None,
        talkative: true,
        ended: ended.map(|at| (END + at, true)),
    };
    (user.into(), witness)
}

fn with(mut around: Around, others: Vec<(String, Witness)>) -> Around {
    let mut everybody = Everybody::new();
    for (user, witness) in others {
        everybody.entry(user).or_default().push(witness);
    }
    around.others = Arc::new(everybody);
    around
}

#[track_caller]
fn is(record: &Record, around: &Around, segment: Segment) -> Verdict {
    let verdict = judge(record, around, &rules());
    assert_eq!(verdict.segment, segment, "{:#?}", verdict.evidence);
    assert!(!verdict.evidence.is_empty());
    verdict
}

#[test]
fn what_is_plain_needs_no_legs() {
    let nothing = Around::default();
    for (record, segment) in [
        (closed(1000), NOBODY),
        (closed(1001), NOBODY),
        (closed(1005), NOBODY),
        (ended(Ender::Instance, How::Fin, None), Serve),
        (ended(Ender::Instance, How::Rst, None), Serve),
        (ended(Ender::Instance, How::Timeout, None), Serve),
        (ended(Ender::Instance, How::Refused, None), Serve),
        (ended(Ender::Instance, How::Close, Some(1001)), Serve),
        (ended(Ender::Instance, How::Close, Some(1012)), Serve),
        (ended(Ender::Dispatch, How::Shutdown, Some(1001)), Dispatch),
        (ended(Ender::Dispatch, How::Revoked, Some(1008)), Dispatch),
        (ended(Ender::Dispatch, How::Error, None), Dispatch),
        // An end without any sign is a fault of ours.
        (
            Record {
                ended_by: None,
                how: None,
                ..cut()
            },
            Dispatch,
        ),
    ] {
        let verdict = is(&record, &nothing, segment);
        assert_eq!(at_once(&record, &rules()), Some(verdict));
    }
}

/// A page gives up with a code of its own, and comes back.
#[test]
fn a_private_code_is_a_drop_if_the_client_comes_back() {
    assert_eq!(at_once(&closed(4000), &rules()), None);
    is(&closed(4000), &clean(), NOBODY);
    let mut back = witness("alice", 5000, None);
    (back.1.opened, back.1.ip) = (END + 3000, "203.0.113.1".into());
    is(&closed(4000), &with(clean(), vec![back.clone()]), LastMile);
    is(&closed(1000), &with(clean(), vec![back.clone()]), NOBODY);
    is(&closed(1001), &with(clean(), vec![back.clone()]), NOBODY);
    back.1.opened = END + 60_000;
    is(&closed(4000), &with(clean(), vec![back]), NOBODY);
    // A leg that was cut is no reason to say goodbye.
    is(
        &closed(4000),
        &around(broken("cloudflare"), well("internal")),
        NOBODY,
    );
}

/// With two probers one may hang while the other is well.
#[test]
fn a_leg_that_another_prober_holds_well_is_clean() {
    let mut both = stalled("cloudflare", -19_000);
    both.conns.extend(well("cloudflare").conns);
    is(&cut(), &around(both, well("internal")), LastMile);
}

/// What a client has borne is not why its tunnel ended later.
#[test]
fn a_silence_that_was_over_colours_nothing() {
    let mut record = cut();
    record.gap = Some(GapRecord {
        length_ms: 18_000,
        ago_ms: 12_000,
    });
    let stall = trouble(Kind::Stall, -30_000, Some(-12_000));
    let healed = || {
        around(
            leg("cloudflare", vec![stall.clone()], None),
            well("internal"),
        )
    };
    is(&record, &healed(), LastMile);
    record.how = Some(How::Close);
    record.code = Some(1000);
    is(&record, &healed(), NOBODY);
    // Nor has anybody broken off who had the same silence and is there still.
    let mut bob = witness("bob", 20_000, None);
    bob.1.gap = Some((END - 30_000, END - 12_000));
    let verdict = is(&silent(47_000), &with(clean(), vec![bob]), LastMile);
    assert!(
        !verdict.evidence.join(" ").contains("broke off"),
        "{verdict:?}"
    );
}

#[test]
fn an_instance_that_closes_in_order_is_at_fault_only_if_it_restarts() {
    let record = ended(Ender::Instance, How::Close, Some(1000));
    assert_eq!(at_once(&record, &rules()), None);
    is(&record, &clean(), NOBODY);
    let mut restarting = clean();
    restarting.instance.troubles = vec![trouble(Kind::Cut, 500, Some(2500))];
    is(&record, &restarting, Serve);
    let mut long_ago = clean();
    long_ago.instance.troubles = vec![trouble(Kind::Cut, -60_000, Some(-50_000))];
    is(&record, &long_ago, NOBODY);
}

#[test]
fn legs_tell_where_a_cut_was() {
    let (cloudflare, internal) = (|| well("cloudflare"), || well("internal"));
    let none = || Leg {
        name: "cloudflare".into(),
        conns: vec![],
        stood: vec![],
    };
    for (around, segment) in [
        (around(cloudflare(), internal()), LastMile),
        (around(broken("cloudflare"), internal()), Edge),
        (around(broken("cloudflare"), broken("internal")), Internal),
        // The way over the edge leads through the load balancer, too.
        (around(cloudflare(), broken("internal")), Unknown),
        (around(none(), internal()), Unknown),
        (around(none(), none()), Unknown),
        (around(broken("cloudflare"), none()), Unknown),
        (around(cloudflare(), none()), Unknown),
        // Broken, but not then.
        (
            around(leg("cloudflare", vec![], Some(-60_000)), internal()),
            LastMile,
        ),
        (
            around(leg("cloudflare", vec![], Some(5000)), internal()),
            LastMile,
        ),
        (
            around(leg("cloudflare", vec![], Some(-2000)), internal()),
            Unknown,
        ),
        // A leg that stalls at the moment of a clean cut fits neither way.
        (around(stalled("cloudflare", -500), internal()), Unknown),
    ] {
        is(&cut(), &around, segment);
        is(&ended(Ender::Client, How::Rst, None), &around, segment);
    }
}

#[test]
fn legs_tell_where_it_went_silent() {
    // Heard last 47 s before the end, so it broke between 48 and 41 s before.
    let record = silent(47_000);
    for (edge, internal, segment) in [
        (well("cloudflare"), well("internal"), LastMile),
        (stalled("cloudflare", -46_000), well("internal"), Edge),
        (
            stalled("cloudflare", -46_000),
            stalled("internal", -46_000),
            Internal,
        ),
        // It stalled while the tunnel was silent, but later; and long before.
        (stalled("cloudflare", -30_000), well("internal"), Unknown),
        (stalled("cloudflare", -90_000), well("internal"), LastMile),
        // Too short a stall to make anybody give up.
        (
            leg(
                "cloudflare",
                vec![trouble(Kind::Stall, -46_000, Some(-42_000))],
                None,
            ),
            well("internal"),
            Unknown,
        ),
    ] {
        is(&record, &around(edge, internal), segment);
    }
}

/// A page's watchdog says goodbye like a person does; its own silence, or the way, has to show which it was.
#[test]
fn a_goodbye_after_a_long_silence_is_a_client_that_gave_up() {
    let gap = |length_ms, ago_ms| Record {
        gap: Some(GapRecord { length_ms, ago_ms }),
        ..closed(1000)
    };
    is(&gap(21_000, 10), &clean(), LastMile);
    is(
        &gap(21_000, 10),
        &around(stalled("cloudflare", -21_000), well("internal")),
        Edge,
    );
    // It came late, and went on for a while: the goodbye was late as well.
    is(&gap(30_000, 18_000), &clean(), LastMile);
    is(
        &gap(16_000, 8_000),
        &around(stalled("cloudflare", -24_000), well("internal")),
        Edge,
    );
    // A short silence that was over is none of it, and neither is one of long ago.
    is(&gap(16_000, 8_000), &clean(), NOBODY);
    is(&gap(30_000, 60_000), &clean(), NOBODY);
    // A tab that is closed has no watchdog.
    let tab = Record {
        code: Some(1001),
        ..gap(21_000, 10)
    };
    is(&tab, &clean(), NOBODY);
    // A client without a heartbeat may be silent.
    let mut quiet = gap(21_000, 10);
    quiet.client.messages = 3;
    is(&quiet, &clean(), NOBODY);
}

/// Where only what we send is lost, the client's goodbye comes in full flow, and nothing but the legs shows the break.
#[test]
fn a_goodbye_while_a_leg_has_stalled_for_as_long_as_a_client_waits() {
    let edge = || around(stalled("cloudflare", -19_000), well("internal"));
    is(&closed(1000), &edge(), Edge);
    is(&cut(), &edge(), Edge);
    // The prober is not heard either, and the client is: it is the prober that hangs.
    let mut deaf = edge();
    deaf.edge.conns[0].spoke = Some(END - 25_000);
    is(&cut(), &deaf, Unknown);
    is(&closed(1001), &edge(), NOBODY);
    let internal = around(stalled("cloudflare", -19_000), stalled("internal", -19_000));
    is(&closed(1000), &internal, Internal);
    // Not long enough, long over, or long before.
    is(
        &closed(1000),
        &around(stalled("cloudflare", -5_000), well("internal")),
        NOBODY,
    );
    is(
        &closed(1000),
        &around(stalled("cloudflare", -60_000), well("internal")),
        NOBODY,
    );
    is(
        &closed(1000),
        &around(
            leg(
                "cloudflare",
                vec![trouble(Kind::Stall, -600_000, None)],
                None,
            ),
            well("internal"),
        ),
        NOBODY,
    );
    // A cut in the same second is not why somebody says goodbye.
    is(
        &closed(1000),
        &around(broken("cloudflare"), well("internal")),
        NOBODY,
    );
}

#[test]
fn an_instance_that_does_not_answer_is_at_fault() {
    let mut record = closed(1000);
    record.unanswered_ms = Some(15_500);
    let verdict = is(&record, &clean(), Serve);
    assert_eq!(verdict.confidence, Confidence::Medium);
    let mut hanging = clean();
    hanging.instance.troubles = vec![trouble(Kind::Stall, -14_000, None)];
    assert_eq!(is(&record, &hanging, Serve).confidence, Confidence::High);
    // The legs have nothing to do with it.
    is(&record, &Around::default(), Serve);
    record.unanswered_ms = Some(9000);
    is(&record, &clean(), NOBODY);
    // The client fell silent itself: what it said last is not what it was cut off from.
    let mut sink = cut();
    (sink.unanswered_ms, sink.unheard_ms) = (Some(20_000), 20_000);
    is(&sink, &clean(), LastMile);
    // A client without a heartbeat may not have wanted an answer.
    let mut quiet = closed(1000);
    quiet.unanswered_ms = Some(600_000);
    quiet.client.messages = 3;
    is(&quiet, &clean(), NOBODY);
    is(&quiet, &hanging, Serve);
    // The same, and what it said before its silence came late.
    let mut sink = cut();
    sink.unanswered_ms = Some(20_000);
    sink.gap = Some(GapRecord {
        length_ms: 20_000,
        ago_ms: 10,
    });
    is(&sink, &clean(), LastMile);
    // Slow, but not for as long as a client waits.
    let mut slow = cut();
    slow.unanswered_ms = Some(9000);
    is(&slow, &hanging, Unknown);
    // The client takes nothing, so that the answers wait here.
    let mut record = cut();
    record.unanswered_ms = Some(18_000);
    record.client.untaken_ms = Some(18_000);
    is(&record, &clean(), LastMile);
    // The instance takes nothing.
    let mut record = cut();
    record.instance.untaken_ms = Some(18_000);
    is(&record, &clean(), Serve);
    // It came to itself while the goodbye was on its way.
    let mut record = closed(1000);
    let (length_ms, ago_ms) = (19_000, 20);
    record.hang = Some(GapRecord { length_ms, ago_ms });
    is(&record, &clean(), Serve);
    record.hang = Some(GapRecord {
        length_ms,
        ago_ms: 10_000,
    });
    is(&record, &clean(), NOBODY);
}

#[test]
fn who_left_before_it_opened() {
    let mut record = cut();
    record.opened = false;
    record.dur_ms = 2000;
    is(&record, &clean(), NOBODY);
    record.dur_ms = 15_000;
    is(&record, &clean(), Serve);
    record.dur_ms = 2000;
    let mut hanging = clean();
    hanging.instance.troubles = vec![trouble(Kind::Stall, -10_000, None)];
    is(&record, &hanging, Serve);
}

#[test]
fn other_people_are_witnesses() {
    let lived = |count: usize| {
        (0..count)
            .map(|n| witness(&"b".repeat(n + 1), 20_000, None))
            .collect::<Vec<_>>()
    };
    let fell = |count: usize| {
        (0..count)
            .map(|n| witness(&"c".repeat(n + 1), -1000, Some(100)))
            .collect::<Vec<_>>()
    };
    let both = || around(broken("cloudflare"), broken("internal"));
    let edge = || around(broken("cloudflare"), well("internal"));
    assert_eq!(
        is(&cut(), &clean(), LastMile).confidence,
        Confidence::Medium
    );
    assert_eq!(
        is(&cut(), &with(clean(), lived(1)), LastMile).confidence,
        Confidence::High
    );
    assert_eq!(
        is(&cut(), &with(edge(), fell(2)), Edge).confidence,
        Confidence::High
    );
    assert_eq!(
        is(&cut(), &with(both(), fell(2)), Internal).confidence,
        Confidence::High
    );
    // The edge's leg was cut, and nobody else felt it: the leg's own way to the edge.
    is(&cut(), &with(edge(), lived(1)), Unknown);
    is(&cut(), &with(edge(), [lived(1), fell(1)].concat()), Edge);
    // Both legs broke, and somebody lived: the prober, or its own way.
    is(&cut(), &with(both(), lived(1)), Unknown);
    // Everybody fell and no leg felt it: they share something else.
    is(&cut(), &with(clean(), fell(2)), Unknown);
    is(
        &cut(),
        &with(clean(), [fell(2), lived(1)].concat()),
        LastMile,
    );
    let mut office = fell(3);
    office
        .iter_mut()
        .for_each(|(_, other)| other.ip = "203.0.113.1".into());
    is(&cut(), &with(clean(), office), LastMile);
    // The same person's other tab is no other person.
    is(
        &cut(),
        &with(both(), vec![witness("alice", 20_000, None)]),
        Internal,
    );
}

#[test]
fn internal_needs_an_instance_that_was_well_and_a_prober_that_was_there() {
    let both = || around(broken("cloudflare"), broken("internal"));
    let mut unasked = both();
    unasked.instance = InstanceHistory::default();
    is(&cut(), &unasked, Unknown);
    let mut ill = both();
    ill.instance.troubles = vec![trouble(Kind::Stall, -3000, None)];
    is(&cut(), &ill, Unknown);
    let mut gone = both();
    gone.opened_since = true;
    is(&cut(), &gone, Unknown);
}

#[test]
fn we_are_at_fault_if_we_stood_still() {
    let mut around = clean();
    around.lags = vec![(END - 20_600, END - 100)];
    is(&cut(), &around, Dispatch);
    is(&silent(20_500), &around, Dispatch);
    is(&closed(1001), &around, NOBODY);
    // A little less than a client waits: something else may have ended it in that time.
    around.lags = vec![(END - 17_000, END - 100)];
    is(&cut(), &around, Unknown);
    // What ends a while later has another reason.
    around.lags = vec![(END - 30_000, END - 10_000)];
    is(&cut(), &around, LastMile);
    // Too short to make anybody give up, or long over.
    around.lags = vec![(END - 3000, END - 100)];
    is(&cut(), &around, LastMile);
    around.lags = vec![(END - 90_000, END - 70_000)];
    is(&cut(), &around, LastMile);
}

/// The far end of a leg that a killed prober held says nothing about the way.
#[test]
fn a_prober_that_was_restarted_is_no_witness() {
    let mut memory = crate::evidence::Memory::default();
    let at = |offset: Millis| END + offset;
    for leg in ["cloudflare", "internal"] {
        let conn = leg.len() as u64;
        let leg = leg.to_owned();
        memory.apply(
            1,
            at(-100_000),
            Event::LegOpened {
                leg: leg.clone(),
                conn,
            },
        );
        memory.apply(
            1,
            at(-99_000),
            Event::ProberStarted {
                leg: leg.clone(),
                conn,
                at: at(-100_000),
            },
        );
        let trouble = trouble(Kind::Cut, 50, None);
        memory.apply(
            1,
            at(50),
            Event::LegEnded {
                leg: leg.clone(),
                conn,
                trouble,
                left: false,
            },
        );
        memory.apply(
            1,
            at(5000),
            Event::LegOpened {
                leg: leg.clone(),
                conn: conn + 100,
            },
        );
        memory.apply(
            1,
            at(5000),
            Event::ProberStarted {
                leg,
                conn: conn + 100,
                at: at(4000),
            },
        );
    }
    let leg = |name: &str| Leg {
        name: name.into(),
        conns: memory.conns_of(name),
        stood: vec![],
    };
    let around = around(leg("cloudflare"), leg("internal"));
    let verdict = is(&cut(), &around, Unknown);
    assert!(
        verdict
            .evidence
            .last()
            .unwrap()
            .contains("the prober was restarted")
    );
}

/// What it misses while it stands still says nothing about the way.
#[test]
fn a_prober_that_stood_still_is_no_witness() {
    let (edge, internal) = (stalled("cloudflare", -46_000), stalled("internal", -46_000));
    let mut around = around(edge, internal);
    is(&silent(47_000), &around, Internal);
    around.edge.stood = vec![(END - 45_500, END - 21_000)];
    around.internal.stood = around.edge.stood.clone();
    let verdict = is(&silent(47_000), &around, Unknown);
    let last = verdict.evidence.last().unwrap();
    assert!(last.contains("while one of its ends stood still"), "{last}");
}

/// A leg that is moved to a new process has a small hole in what is known of it, and no trouble.
#[test]
fn a_leg_that_is_moved_stays_clean() {
    let moved = |name: &str, hole: Millis| {
        let mut old = Conn::of(name, END - 100_000);
        (old.heard, old.left) = (END, true);
        let mut new = Conn::of(name, END + hole);
        new.heard = END + 30_000;
        Leg {
            name: name.into(),
            conns: vec![old, new],
            stood: vec![],
        }
    };
    is(
        &cut(),
        &around(moved("cloudflare", 400), moved("internal", 50)),
        LastMile,
    );
    is(
        &cut(),
        &around(moved("cloudflare", 20_000), moved("internal", 50)),
        Unknown,
    );
}
