package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"time"
)

// job is what a process of callers has to do. It comes as a line on standard input; the process answers
// "ready" when all of its callers ask, measures from the next line on, and answers a result.
type job struct {
	Ask     string        `json:"ask"`     // one of openers
	Address string        `json:"address"` // of the system
	Callers int           `json:"callers"`
	Shared  bool          `json:"shared"`
	Name    string        `json:"name"` // of this process, in one row of one run
	Time    time.Duration `json:"time"`
	Dir     string        `json:"dir"`               // on the disk that is measured
	Profile string        `json:"profile,omitempty"` // a file for its own CPU profile of that time
	// Like is the transaction of a registration, for those who do the same without us.
	Like *transaction `json:"like,omitempty"`
}

type result struct {
	IDs     uint64        `json:"ids"`
	Took    time.Duration `json:"took"`
	Latency histogram     `json:"latency"`
	CPU     time.Duration `json:"cpu"` // of the process, meanwhile
}

// asker asks once, waits for the answer, and tells how many ids, or sandboxes, that was.
type asker func(context.Context) (uint64, error)

// patience bounds the opening of connections, and the answers to calls that were under way at the end.
const patience = 20 * time.Second

// trial is one row in one round.
type trial struct {
	rate     float64 // ids a second
	p50, p99 time.Duration
	commits  float64 // of etcd, a second; 0 where there is none
	entries  float64 // of etcd's raft log, an id
	// Processor time an id: of the server, and of its callers.
	server, callers time.Duration
}

// measure is one trial: it starts the callers, lets them warm up, and reads etcd's figures while they ask.
func measure(ctx context.Context, o options, r row, s *system) (t trial, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*patience+o.warm+o.time)
	defer cancel()
	n := max(r.load.Processes, 1)
	procs := make([]*process, 0, n)
	defer func() {
		for _, p := range procs {
			err = errors.Join(err, p.end())
		}
	}()
	for i := range n {
		j := job{Ask: r.ask, Callers: r.load.Callers / n, Shared: r.load.Shared, Name: fmt.Sprintf("%s-%d", r.what, i), Time: o.time, Dir: o.dir}
		if o.profile != "" {
			j.Profile = filepath.Join(o.profile, fmt.Sprintf("%s-%s-%d.pprof", r.what, r.load, i))
		}
		if s != nil {
			j.Address, j.Like = s.address, s.like
		}
		p, err := startCallers(ctx, j)
		if err != nil {
			return t, err
		}
		procs = append(procs, p)
	}
	for _, p := range procs {
		if line, err := p.line(); err != nil || line != "ready\n" {
			return t, fmt.Errorf("its callers did not begin: %q: %w", line, err)
		}
	}
	wait := func(d time.Duration) error {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := wait(o.warm); err != nil {
		return t, err
	}
	for _, p := range procs {
		if _, err := io.WriteString(p.in, "go\n"); err != nil {
			return t, err
		}
	}
	var etcd etcdRate
	var busy time.Duration // of the server, a second
	err = s.busy(&busy, func() error {
		if s == nil || s.etcd == nil {
			return wait(o.time * 9 / 10)
		}
		etcd, err = s.etcd.rate(ctx, func() error { return wait(o.time * 9 / 10) })
		return err
	})
	if err != nil {
		return t, err
	}
	latency, callers := newHistogram(), 0.0
	for _, p := range procs {
		line, err := p.line()
		if err != nil {
			return t, fmt.Errorf("its callers gave no figures: %w", err)
		}
		var res result
		if err := json.Unmarshal([]byte(line), &res); err != nil {
			return t, err
		}
		t.rate += float64(res.IDs) / res.Took.Seconds()
		callers += res.CPU.Seconds() / res.Took.Seconds()
		latency.merge(res.Latency)
	}
	if t.rate == 0 {
		return t, fmt.Errorf("no call was answered in %s", patience)
	}
	t.p50, t.p99 = latency.quantile(.5), latency.quantile(.99)
	t.commits, t.entries = etcd.revisions, etcd.entries/t.rate
	t.server, t.callers = time.Duration(float64(busy)/t.rate), time.Duration(callers*1e9/t.rate)
	return t, nil
}

// process is one of callers.
type process struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startCallers(ctx context.Context, j job) (*process, error) {
	text, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	cmd, err := roleCommand(ctx, "callers")
	if err != nil {
		return nil, err
	}
	p, err := startProcess(cmd)
	if err != nil {
		return nil, err
	}
	_, err = p.in.Write(append(text, '\n'))
	return p, err
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	return &process{cmd, in, bufio.NewReader(out)}, cmd.Start()
}

func (p *process) line() (string, error) { return p.out.ReadString('\n') }

// end closes its input and waits for it.
func (p *process) end() error {
	_ = p.in.Close()
	_, _ = io.Copy(io.Discard, p.out)
	return p.cmd.Wait()
}

// The phases of a process of callers.
const (
	warming int32 = iota
	measuring
	over
)

func callersRole() error {
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadString('\n')
	if err != nil {
		return err
	}
	var j job
	if err := json.Unmarshal([]byte(line), &j); err != nil {
		return err
	}
	open, ok := openers[j.Ask]
	if !ok {
		return fmt.Errorf("nobody asks for %q", j.Ask)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	opening := time.AfterFunc(patience, cancel)
	askers, err := open(ctx, j)
	if err != nil || !opening.Stop() {
		return fmt.Errorf("open %s: %w", j.Ask, errors.Join(err, ctx.Err()))
	}
	var phase atomic.Int32
	var all sync.WaitGroup
	counts, latencies, errs := make([]uint64, len(askers)), make([]histogram, len(askers)), make([]error, len(askers))
	failed, answered := make(chan struct{}, len(askers)), make(chan struct{})
	var once sync.Once
	for i, ask := range askers {
		all.Go(func() {
			// Not in the slices: callers next to each other would share a cache line.
			var ids uint64
			latency := newHistogram()
			for phase.Load() != over {
				began := time.Now()
				n, err := ask(ctx)
				if err != nil {
					if errs[i] = err; phase.Load() == over {
						errs[i] = nil // it was cut off
					}
					failed <- struct{}{}
					break
				}
				if phase.Load() == measuring {
					once.Do(func() { close(answered) })
					ids += n
					latency.add(time.Since(began))
				}
			}
			counts[i], latencies[i] = ids, latency
		})
	}
	fmt.Println("ready")
	if _, err := in.ReadString('\n'); err != nil {
		return errors.New("the bench is gone")
	}
	if j.Profile != "" {
		f, err := os.Create(j.Profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	began, cpu := time.Now(), ownCPU()
	phase.Store(measuring)
	timer := time.NewTimer(j.Time)
	select {
	case <-timer.C:
		select {
		case <-answered: // however short the time is
		case <-failed:
		case <-time.After(patience):
		}
	case <-failed:
	}
	took := time.Since(began)
	cpu = ownCPU() - cpu
	phase.Store(over)
	defer time.AfterFunc(patience, cancel).Stop()
	time.AfterFunc(time.Second, cancel)
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%s: %s", j.Ask, first(err.Error()))
	}
	res := result{Took: took, CPU: cpu, Latency: newHistogram()}
	for i := range askers {
		res.IDs += counts[i]
		res.Latency.merge(latencies[i])
	}
	return json.NewEncoder(os.Stdout).Encode(res)
}
