package server

import "github.com/prometheus/client_golang/prometheus"

// witnessCollector reads what the witness says of this server.
type witnessCollector struct{ w Witness }

var (
	descTrusts = prometheus.NewDesc("nsalloc_store_trusted", "1 while this server trusts its store; 0 while it issues nothing, because it has not heard what other servers have seen, or the store has lost history.", nil, nil)
	descRaised = prometheus.NewDesc("nsalloc_generations_raised_total", "Generations that this server has taken by itself.", nil, nil)
	descHeard  = prometheus.NewDesc("nsalloc_servers_heard", "Other servers by whether their witness was heard when they were asked last.", []string{"heard"}, nil)
)

func (witnessCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- descTrusts
	ch <- descRaised
	ch <- descHeard
}

func (c witnessCollector) Collect(ch chan<- prometheus.Metric) {
	st := c.w.Standing()
	var trusts, heard, not float64
	if st.Trusts {
		trusts = 1
	}
	for _, o := range st.Others {
		if o.Says.Heard() {
			heard++
		} else {
			not++
		}
	}
	ch <- prometheus.MustNewConstMetric(descTrusts, prometheus.GaugeValue, trusts)
	ch <- prometheus.MustNewConstMetric(descRaised, prometheus.CounterValue, float64(st.Raised))
	ch <- prometheus.MustNewConstMetric(descHeard, prometheus.GaugeValue, heard, "yes")
	ch <- prometheus.MustNewConstMetric(descHeard, prometheus.GaugeValue, not, "no")
}
